"""What a tensor follows from, where autograd keeps that anyway: then the tensor itself need not be kept.

    y = F.batch_norm(x, ...)        # its backward keeps x, and y = x * scale + offset
    z = y * gate + shortcut         # the gradient of the gate reads y, a second tensor to keep

The step that made a tensor is looked up in the graph of its backward. So it does not matter which module computed it:
norms and layer scales are called as ever, hooks included.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sem_timm.compat import TELLS_SAVED_TENSORS_HOOKS, may_hook_saved_tensors, saved_tensors_hooks_in_force
from sem_timm.layers.recording import may_write_over

# The batch norms of torch on a CPU and on GPUs, and the product, which is what layer scale and drop path are.
_BATCH_NORMS = ('NativeBatchNormBackward0', 'CudnnBatchNormBackward0', 'MiopenBatchNormBackward0')
_PRODUCT, _PERMUTED, _SAME = 'MulBackward0', 'PermuteBackward0', 'AliasBackward0'

# Sums over half precision are computed in float32, of so many parts of the batch, one after the other.
_HALF, _PARTS = (torch.float16, torch.bfloat16), 8

# Numbers in samples that are small enough to be multiplied some at a time: the products stay in the cache.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Kept:
    """A tensor (B, C, ...) or (B, ..., C) as ``kept * scale + offset``, of a tensor that autograd keeps.

    Attributes:
        node: The step of the backward that keeps the other tensor, until it was run itself.
        name: Under which name it does.
        order: The axes of what it keeps, in the order of those of the tensor.
        positions: The axes of positions.
        scale: Broadcasts to the tensor, and is the same at all positions.
        offset: The same; None where there is none.
    """

    node: Any
    name: str
    order: tuple[int, ...]
    positions: tuple[int, ...]
    scale: Tensor
    offset: Tensor | None

    @property
    def kept(self) -> Tensor:
        """What is kept, which is an error once it was freed."""
        kept: Tensor = getattr(self.node, self.name)
        return kept.permute(self.order)

    def again(self) -> Tensor:
        """The tensor."""
        product = self.kept * self.scale
        return product if self.offset is None else product + self.offset

    def dot(self, other: Tensor) -> Tensor:
        """The sums over positions of the tensor times another one of its shape, (B, C)."""
        products, sums = sums_of(self.kept, other, self.positions)
        products = products * self.scale.squeeze(self.positions)
        return products if self.offset is None else torch.addcmul(products, sums, self.offset.squeeze(self.positions))


def sums_of(kept: Tensor, other: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The sums over positions of a product, and of its second factor, (B, C) both."""
    plain = may_write_over()  # or else, gradients of many tensors are computed at once
    if plain and kept.dtype == other.dtype and other.numel():
        one, two = (_channels_second(each, positions) for each in (other, kept))
        if other.device.type in ('cpu', 'cuda') and one.is_contiguous() and two.is_contiguous():
            rows = (1, one.shape[0] * one.shape[1], -1)
            sums, products = _gradients(one.view(rows), two.view(rows))
            return products.view(one.shape[:2]), sums.view(one.shape[:2])
        if other.device.type == 'cpu' and all(each.permute(0, 2, 3, 1).is_contiguous() for each in (one, two)):
            samples = _SMALL // one[0].numel()
            if samples > 1:
                return _sums_of_parts(kept.split(samples), other.split(samples), positions)
            sums, products = map(torch.stack, zip(*map(_gradients, one.split(1), two.split(1))))
            return products, sums
    if other.dtype in _HALF:
        return _sums_of_parts(kept.chunk(_PARTS), other.chunk(_PARTS), positions)
    return (kept * other).sum(positions), other.sum(positions)


def _sums_of_parts(
    kept: Iterable[Tensor], other: Iterable[Tensor], positions: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`sums_of` tensors that are split along the batch."""
    sums = [
        ((one.to(_sum_type(one)) * two).sum(positions), two.sum(positions, dtype=_sum_type(two)))
        for one, two in zip(kept, other)
    ]
    products, plain = map(torch.cat, zip(*sums))
    return products, plain


def _gradients(other: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of a tensor, and of its product with another one, over all axes but the second, in one pass.

    They are the gradients of bias and weight of a batch norm.
    """
    mean, deviation = (torch.full((other.shape[1],), n, dtype=_sum_type(other), device=other.device) for n in (0, 1))
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        other, kept, deviation, None, None, mean, deviation, True, 0.0, [False, True, True]
    )
    return sums, products


def _channels_second(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """(B, C, height, width), or one axis or three of them, as one of two; a view where memory allows it."""
    x = x if positions[0] == 2 else x.movedim(-1, 1)
    return x.flatten(3) if x.ndim > 4 else x[..., None] if x.ndim == 3 else x


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def kept_of(y: Tensor, positions: tuple[int, ...]) -> Kept | None:
    """What a tensor follows from, or None where it has to be kept itself to be there in the backward.

    Args:
        y: (B, C, ...) or (B, ..., C).
        positions: Its axes of positions.
    """
    if y.grad_fn is None or not y.numel():
        return None
    with torch.no_grad():
        try:
            found = _made_by(y.grad_fn, y, positions)
        except RuntimeError:  # what was kept is freed, or written over: only a backward has to complain
            return None
        if found is None or found.offset is not None or found.name != '_saved_input':
            return found
        # The bias of a norm that does not learn is nowhere in the graph. One position tells it.
        if y.dtype in _HALF:
            return None
        kept = found.kept
        for axis in positions:
            y, kept = y.narrow(axis, 0, 1), kept.narrow(axis, 0, 1)
        return replace(found, offset=y - kept * found.scale)


def may_read_the_graph() -> bool:
    """Whether what autograd keeps can be read more than once, and is what it was given."""
    if not TELLS_SAVED_TENSORS_HOOKS or not may_hook_saved_tensors():
        return False
    hooks = saved_tensors_hooks_in_force()
    if hooks is None:
        return True
    pack, unpack = hooks
    # Those of gradient checkpointing and offloading hand out every tensor once, or a copy. Others may only count.
    if _is_torchs(pack):
        return False
    probe = torch.empty(0)
    packed = pack(probe)
    unpack(packed)
    return packed is probe


def is_readable(node: Any) -> bool:
    """The same for what one step keeps, which may have been run under hooks that are over by now."""
    kind: Any = type(node)
    for name in _saved_by(kind):
        saved = getattr(node, name)
        for each in saved if isinstance(saved, (tuple, list)) else (saved,):
            hook = None if each is None else each.unpack_hook
            if hook is not None and (_is_torchs(hook) or not isinstance(each.data, Tensor)):
                return False
    return True


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, '__module__', '')).partition('.')[0] == 'torch'


@cache
def _saved_by(kind: Hashable) -> tuple[str, ...]:
    """Under which names steps of a class keep tensors, packed as hooks left them."""
    return tuple(name for name in dir(kind) if name.startswith('_raw_saved_'))


def _made_by(node: Any, y: Tensor, positions: tuple[int, ...]) -> Kept | None:
    """How the result of a step, of the shape of ``y``, follows from what the step keeps, or one before it."""
    if node is None:
        return None
    if node.name() == _SAME:
        return _made_by(node.next_functions[0][0], y, positions)
    if node.name() == _PERMUTED:
        return _permuted(node, y, positions)
    is_norm = node.name() in _BATCH_NORMS and positions[0] == 2
    if not (is_norm or node.name() == _PRODUCT) or not is_readable(node):
        return None
    if is_norm:
        return _normalized(node, y, positions)
    for factor, name, edge in (('_saved_other', '_saved_self', 0), ('_saved_self', '_saved_other', 1)):
        scale, kept = getattr(node, factor), getattr(node, name)
        scale = None if scale is None else _at_one_position(scale, y, positions)
        if scale is None:
            continue
        if kept is not None:
            # A copy, as the scale may be a parameter that is written over before the backward.
            scale = scale.reshape((1,) * (y.ndim - scale.ndim) + tuple(scale.shape)).clone()
            return Kept(node, name, tuple(range(y.ndim)), positions, scale, None) if kept.shape == y.shape else None
        # Nobody keeps the input of a drop path, which has nothing to learn; that may follow from something as well.
        if shape_of(node.next_functions[edge]) != y.shape:
            return None
        before = _made_by(node.next_functions[edge][0], y, positions)
        if before is None:
            return None
        offset = None if before.offset is None else before.offset * scale
        return replace(before, scale=before.scale * scale, offset=offset)
    return None


def _permuted(node: Any, y: Tensor, positions: tuple[int, ...]) -> Kept | None:
    """The result of a change of order of the axes."""
    order = order_of(node)
    inverse = tuple(map(order.index, range(y.ndim)))
    positions_before = tuple(sorted(order[axis] for axis in positions))
    before = _made_by(node.next_functions[0][0], y.permute(inverse), positions_before)
    if before is None:
        return None
    scale, offset = (None if each is None else each.permute(order) for each in (before.scale, before.offset))
    assert scale is not None
    order = tuple(before.order[axis] for axis in order)
    return replace(before, order=order, positions=positions, scale=scale, offset=offset)


def shape_of(edge: tuple[Any, int]) -> torch.Size | None:
    """The shape of what a step of the forward was given, by the edge to the step before it."""
    node, number = edge
    metadata = getattr(node, '_input_metadata', ())
    return torch.Size(metadata[number].shape) if number < len(metadata) else None


def bias_of(node: Any, index: int) -> Any:
    """The parameter that a step was given at a place; None if it was given none that learns."""
    return getattr(node.next_functions[index][0], 'variable', None)


def order_of(node: Any) -> tuple[int, ...]:
    """The order of axes that a permutation makes."""
    axes = tuple(node._saved_dims)
    return tuple((axis - 2**64 if axis >= 2**63 else axis) % len(axes) for axis in axes)


def _normalized(node: Any, y: Tensor, positions: tuple[int, ...]) -> Kept:
    """The result of a batch norm; without offset where the bias has no gradient."""
    if node._saved_training:
        mean, scale = node._saved_result1, node._saved_result2
    else:
        eps = node._saved_eps if hasattr(node, '_saved_eps') else node._saved_epsilon
        mean, scale = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight
    bias = bias_of(node, 2)
    shape = (1, -1, *(1 for _ in positions))
    offset = None if bias is None else (bias - mean * scale).view(shape)
    return Kept(node, '_saved_input', tuple(range(y.ndim)), positions, scale.view(shape), offset)


def _at_one_position(scale: Tensor, y: Tensor, positions: tuple[int, ...]) -> Tensor | None:
    """What a tensor is multiplied by, with an axis of length one for all positions; None where they differ."""
    for axis in positions:
        axis -= y.ndim
        if -axis > scale.ndim or scale.shape[axis] == 1:
            continue
        if scale.stride(axis) != 0:
            return None
        scale = scale.narrow(axis, 0, 1)
    return scale
