"""Which axis of a tensor holds the channels, and how many tokens in front are not image: followed through a forward.

Sizes cannot tell (tokens may equal channels, height may equal both), so the layout is carried from operation to
operation: a convolution puts the channels on axis 1, a linear layer on the last one, permutations and reshapes move
them, concatenating learned tokens in front adds prefix tokens. Runs on meta tensors, in one pass, beside the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from sem_timm.surgery.shapes import SHAPES


@dataclass(frozen=True)
class Layout:
    """Where the channels of a tensor are.

    Attributes:
        channel: Index of the channel axis, or None where the channels are split or gone.
        prefix: Number of leading tokens (class, register, distillation) of a (B, N, C) tensor.
        batch: Index of the batch axis, with what else is folded into it, or None where it is folded into another.
    """

    channel: int | None = None
    prefix: int = 0
    batch: int | None = 0


def set_layout(tensor: Tensor, layout: Layout) -> Tensor:
    tensor._layout = layout  # type: ignore[attr-defined]
    return tensor


def layout_of(value: Any) -> Layout | None:
    """The layout that `LayoutMode` found for a tensor; None for parameters and for what derives only from them."""
    return getattr(value, '_layout', None) if isinstance(value, Tensor) else None


class LayoutMode(TorchFunctionMode):
    """Marks every tensor that derives from a marked one with its `Layout`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name == '__get__':  # a property such as shape, or a transposed view
            name = getattr(func.__self__, '__name__', '')
            if name not in ('T', 'mT', 'H', 'mH'):
                return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        sources = [tensor for tensor in tensors if layout_of(tensor) is not None]
        shape = SHAPES.get(name) if tensors and tensors[0].is_meta else None
        out = NotImplemented if shape is None else shape(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if sources:
            rule = _RULES.get(name, _inherit)
            outputs = [out] if isinstance(out, Tensor) else list(_tensors((out,)))
            for index, output in enumerate(outputs):
                layout = rule(output, index, outputs, sources, args, kwargs)
                if layout is not None:
                    set_layout(output, layout)
        return out


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple) or isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _of(tensor: Tensor) -> Layout:
    return layout_of(tensor) or Layout()


def _inherit(out: Tensor, index: int, outputs: list[Tensor], sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    """The layout of the input that looks most like the output: same shape before same number of axes."""
    alike = [source for source in sources if source.shape == out.shape]
    alike += [source for source in sources if source.ndim == out.ndim and source.shape != out.shape]
    layouts = [_of(source) for source in alike]
    channel = next((layout.channel for layout in layouts if layout.channel is not None), None)
    same_tokens = [_of(s).prefix for s in alike if s.ndim == 3 and s.shape[1] == out.shape[1]]
    return Layout(channel, max(same_tokens, default=0), layouts[0].batch if layouts else 0)


def _axis_one(out: Tensor, index: int, outputs: list[Tensor], sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    return Layout(1)


def _last_axis(out: Tensor, index: int, outputs: list[Tensor], sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source = sources[0]
    same_tokens = source.ndim == 3 and out.ndim == 3 and source.shape[1] == out.shape[1]
    batch = _of(source).batch if source.ndim == out.ndim else 0
    return Layout(out.ndim - 1, _of(source).prefix if same_tokens else 0, batch)


def _layer_norm(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    shape = kwargs.get('normalized_shape', args[1] if len(args) > 1 else ())
    if isinstance(shape, int) or len(shape) == 1:
        return _last_axis(out, index, outputs, sources, args, kwargs)
    return _inherit(out, index, outputs, sources, args, kwargs)


def _permuted(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    dims = kwargs.get('dims', args[1] if len(args) == 2 else args[1:])
    order = [int(d) % source.ndim for d in ((dims,) if isinstance(dims, int) else dims)]
    channel, batch = (None if axis is None else order.index(axis) for axis in (layout.channel, layout.batch))
    return Layout(channel, layout.prefix if source.ndim == 3 and order[1] == 1 else 0, batch)


def _transposed(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    given = [*args[1:], *(kwargs[key] for key in ('dim0', 'dim1', 'axis0', 'axis1') if key in kwargs)] or [0, 1]
    first, second = (int(d) % source.ndim for d in given[:2])
    swap = {first: second, second: first}
    channel, batch = (None if axis is None else swap.get(axis, axis) for axis in (layout.channel, layout.batch))
    # A transposed token axis keeps its prefix: mixers and attention transpose back before the tokens are used again.
    return Layout(channel, layout.prefix, batch)


def _matrix_transposed(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    return _transposed(out, index, outputs, sources, (args[0], -2, -1), {})


def _moved(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    given = [*args[1:], *(kwargs[key] for key in ('source', 'destination') if key in kwargs)]
    moved, places = ([int(d) % source.ndim for d in ((g,) if isinstance(g, int) else g)] for g in given)
    order = [axis for axis in range(source.ndim) if axis not in moved]
    for place, axis in sorted(zip(places, moved)):
        order.insert(place, axis)
    channel, batch = (None if axis is None else order.index(axis) for axis in (layout.channel, layout.batch))
    return Layout(channel, 0, batch)


def _unknown(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    return Layout()


def _reshaped(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    """An axis survives a reshape where the new shape has an axis of its size behind the same number of elements."""
    source, layout = sources[0], _of(sources[0])
    if source.shape == out.shape:
        return layout
    batch = _same_axis(source, out, layout.batch)
    if layout.batch == 0 and out.ndim and out.shape[0] > 1 and _divides(source.shape[0], out.shape[0]):
        batch = 0  # windows, heads or tokens folded into the batch, or unfolded from it
    return Layout(_same_axis(source, out, layout.channel), 0, batch)


def _divides(one: int, other: int) -> bool:
    return one > 0 and (one % other == 0 or other % one == 0)


def _same_axis(source: Tensor, out: Tensor, axis: int | None) -> int | None:
    if axis is None or not source.numel():
        return None
    size, inner = source.shape[axis], prod(source.shape[axis + 1 :])
    return next((d for d in range(out.ndim) if out.shape[d] == size and prod(out.shape[d + 1 :]) == inner), None)


def _matmul(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    given = [*args, *(kwargs[key] for key in ('input', 'other', 'mat2') if key in kwargs)]
    first, second = given[:2]
    left, right = layout_of(first), layout_of(second)
    batch = left.batch if left is not None and first.ndim == out.ndim else 0
    if left is not None and (right is None or right.channel == second.ndim - 1):
        return Layout(out.ndim - 1, 0, batch)
    if left is not None and left.channel is not None and left.channel == first.ndim - 2:
        return Layout(out.ndim - 2, 0, batch)
    return Layout(None, 0, batch)


def _concatenated(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    parts = list(_tensors(args[:1] or (kwargs.get('tensors', ()),)))
    dim = kwargs.get('dim', kwargs.get('axis', args[1] if len(args) > 1 else 0))
    channel = next((_of(part).channel for part in sources if _of(part).channel is not None), None)
    batch = _of(sources[0]).batch
    if out.ndim != 3 or dim % 3 != 1 or channel == 1:
        prefix = max((_of(part).prefix for part in sources), default=0) if out.ndim == 3 else 0
        return Layout(channel, prefix, batch)
    prefix = 0
    for part in parts:  # learned tokens, and tokens that were a prefix before, until the first image tokens
        own = part.shape[1] if layout_of(part) is None else _of(part).prefix
        prefix += own
        if own < part.shape[1]:
            break
    return Layout(channel, prefix, batch)


def _indexed(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    if source is not args[0]:
        return Layout()
    steps = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(step, (Tensor, list)) for step in steps):
        return layout if out.ndim == source.ndim else Layout()
    missing = source.ndim - sum(step is not None and step is not Ellipsis for step in steps)
    axis, position, prefix = 0, 0, layout.prefix
    channel: int | None = None
    batch: int | None = None
    full: list[Any] = []
    for step in steps:
        full += [slice(None)] * missing if step is Ellipsis else [step]
    for step in full + [slice(None)] * (source.ndim - sum(step is not None for step in full)):
        if step is None:
            position += 1
            continue
        if axis == 1 and source.ndim == 3:
            prefix = _sliced_prefix(step, source.shape[1], layout.prefix)
        if isinstance(step, slice):
            channel = position if axis == layout.channel else channel
            batch = position if axis == layout.batch else batch
            position += 1
        axis += 1
    return Layout(channel, prefix if out.ndim == 3 else 0, batch)


def _sliced_prefix(step: Any, size: int, prefix: int) -> int:
    if not isinstance(step, slice):
        return 0
    kept = range(size)[step]
    return sum(token < prefix for token in kept)


def _split(out: Tensor, index: int, outputs: list[Tensor], sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    dim = kwargs.get('dim', args[2] if len(args) > 2 else 0) % source.ndim
    if source.ndim != 3 or dim != 1:
        return layout
    start = sum(part.shape[1] for part in outputs[:index])
    return Layout(layout.channel, min(max(layout.prefix - start, 0), out.shape[1]), layout.batch)


def _unbound(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    source, layout = sources[0], _of(sources[0])
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0) % source.ndim
    channel, batch = (None if a in (None, dim) else a - (dim < a) for a in (layout.channel, layout.batch))
    return Layout(channel, 0, batch)


def _stacked(out: Tensor, index: int, outputs: Any, sources: list[Tensor], args: Any, kwargs: Any) -> Layout:
    layout = _of(sources[0])
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0) % out.ndim
    channel, batch = (None if a is None else a + (dim <= a) for a in (layout.channel, layout.batch))
    return Layout(channel, 0, batch)


_Rule = Callable[..., Layout]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(('conv1d', 'conv2d', 'conv3d', 'batch_norm', 'group_norm', 'instance_norm'), _axis_one),
    **dict.fromkeys(('linear', 'embedding', 'bilinear'), _last_axis),
    **dict.fromkeys(('layer_norm', 'rms_norm'), _layer_norm),
    'permute': _permuted,
    **dict.fromkeys(('transpose', 'swapaxes', 'swapdims'), _transposed),
    **dict.fromkeys(
        ('view', 'reshape', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'view_as', 'reshape_as'), _reshaped
    ),
    **dict.fromkeys(('matmul', '__matmul__', 'bmm'), _matmul),
    **dict.fromkeys(('cat', 'concat', 'concatenate'), _concatenated),
    '__getitem__': _indexed,
    **dict.fromkeys(('split', 'chunk', 'split_with_sizes', 'tensor_split'), _split),
    **dict.fromkeys(('unbind', 'select'), _unbound),
    'stack': _stacked,
    **dict.fromkeys(('T', 'mT', 'H', 'mH'), _matrix_transposed),
    **dict.fromkeys(('movedim', 'moveaxis'), _moved),
    'einsum': _unknown,
}
