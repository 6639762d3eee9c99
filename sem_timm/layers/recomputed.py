"""Tensors that the backward computes again, of what the step that made them keeps for its own gradient.

    y = F.linear(h, weight, bias)   # keeps h
    z = y * gate + shortcut         # the gradient of the gate reads y, a second tensor to keep

An activation or a layer norm is quickly computed again. A matrix product or a convolution is not, but in a network
whose next layer keeps z, and another one the shortcut, y is (z - shortcut) / gate, up to the rounding of z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm.layers.kept import bias_of, is_readable, order_of, shape_of


def _has_no_bias(node: Any) -> bool:
    return node.name() == 'ConvolutionBackward0' and node._saved_bias_sym_sizes_opt in (None, [], (), (0,), [0])


def _layer_norm(node: Any) -> Tensor:
    normalized = (node._saved_input - node._saved_result1) * node._saved_result2
    if node._saved_weight is not None:
        normalized = normalized * node._saved_weight
    return normalized if node._saved_bias is None else normalized + node._saved_bias


def _convolution(node: Any) -> Tensor:
    options = (node._saved_stride, node._saved_padding, node._saved_dilation)
    transposed = (node._saved_transposed, node._saved_output_padding, node._saved_groups)
    bias = None if _has_no_bias(node) else bias_of(node, 2)
    return torch.ops.aten.convolution(node._saved_input, node._saved_weight, bias, *options, *transposed)


_ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    'SiluBackward0': lambda node: F.silu(node._saved_self),
    'GeluBackward0': lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    'HardswishBackward0': lambda node: F.hardswish(node._saved_self),
    'NativeLayerNormBackward0': _layer_norm,
}
_PRODUCTS: dict[str, tuple[Callable[[Any], Tensor], tuple[str, ...], int | None]] = {
    'AddmmBackward0': (lambda node: bias_of(node, 0) + node._saved_mat1 @ node._saved_mat2, ('mat1', 'mat2'), 0),
    'MmBackward0': (lambda node: node._saved_self @ node._saved_mat2, ('self', 'mat2'), None),
    'ConvolutionBackward0': (_convolution, ('input', 'weight'), 2),
}
_MOVES = ('ViewBackward0', 'UnsafeViewBackward0', 'AliasBackward0', 'PermuteBackward0')


@dataclass
class Recomputed:
    """A tensor that its own step computes again.

    Attributes:
        node: The step of the backward, which keeps what it is computed of until it was run itself.
        shape: The shape of the tensor.
        is_dear: Whether it takes a matrix product or a convolution.
        biases: Parameters that no step keeps, and their versions.
    """

    node: Any
    shape: torch.Size
    is_dear: bool
    biases: list[tuple[Tensor, int]]

    def again(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: If what it is computed of was freed or written over.
        """
        for bias, version in self.biases:
            if bias._version != version:
                raise RuntimeError(
                    'one of the variables needed for gradient computation has been modified by an inplace operation: '
                    f'a bias of shape {tuple(bias.shape)} before a gate is at version {bias._version}; expected '
                    f'version {version} instead.'
                )
        return _computed(self.node, self.shape)


@dataclass
class Difference(Recomputed):
    """A tensor as the difference of its gated sum and the shortcut; if one was written over, it is computed again.

    Attributes:
        shortcut: The shortcut.
        gate: The gate, as it is multiplied with the tensor.
        total: The gated sum, once it is there.
    """

    shortcut: Tensor
    gate: Tensor
    total: Tensor

    def __post_init__(self) -> None:
        # They share the memory of what others keep, but are no part of the graph, which would hold them on its own.
        self.shortcut, self.total = self.shortcut.detach(), self.total.detach()
        self.versions = (self.shortcut._version, self.total._version)

    def again(self) -> Tensor:
        """The tensor."""
        if (self.shortcut._version, self.total._version) != self.versions:
            return super().again()
        # A gate of zero has no gradient whatever the tensor is.
        return (self.total - self.shortcut) / self.gate.masked_fill(self.gate == 0, torch.inf)


def recomputed_of(y: Tensor, *, dear: bool) -> Recomputed | None:
    """How the backward computes a tensor again, or None where it cannot.

    Args:
        y: The tensor.
        dear: Whether a matrix product or a convolution will do, too.
    """
    if y.grad_fn is None:
        return None
    try:
        return _found(y, dear)
    except RuntimeError:  # what was kept is freed, or written over: only a backward has to complain
        return None


def _found(y: Tensor, dear: bool) -> Recomputed | None:
    node: Any = y.grad_fn
    shape, biases = y.shape, []
    while (is_move := node.name() in _MOVES) or _is_constant_product(node) or _is_sum_with_bias(node):
        if is_move:
            shape = _shape_before(node, shape)
        elif shape_of(node.next_functions[0]) != shape:
            return None
        if node.name() == 'AddBackward0':
            biases.append(bias_of(node, 1))
        node = node.next_functions[0][0]
        if node is None:
            return None
    if node.name() not in (*_ACTIVATIONS, *_PRODUCTS) or not is_readable(node):
        return None
    if node.name() in _ACTIVATIONS:
        return Recomputed(y.grad_fn, y.shape, False, [(bias, bias._version) for bias in biases])
    if not dear or y.dtype not in (torch.float32, torch.float64):
        return None
    _, names, place = _PRODUCTS[node.name()]
    if any(getattr(node, f'_saved_{name}') is None for name in names):
        return None
    if node.name() == 'AddmmBackward0' and not node._saved_alpha == node._saved_beta == 1:
        return None
    if place is not None and not _has_no_bias(node):
        if bias_of(node, place) is None:
            return None
        biases.append(bias_of(node, place))
    return Recomputed(y.grad_fn, y.shape, True, [(bias, bias._version) for bias in biases])


def _is_constant_product(node: Any) -> bool:
    """Whether a step multiplies with numbers that do not learn, as drop path does."""
    if node.name() != 'MulBackward0' or not is_readable(node):
        return False
    return node._saved_self is None and node._saved_other is not None


def _is_sum_with_bias(node: Any) -> bool:
    """Whether a step adds a bias, as linear layers do where their input is in another order in memory."""
    return node.name() == 'AddBackward0' and node._saved_alpha == 1 and bias_of(node, 1) is not None


def _shape_before(node: Any, shape: torch.Size) -> torch.Size:
    """The shape of what was viewed, or given another order of axes; from that of the result."""
    if node.name() == 'PermuteBackward0':
        order = order_of(node)
        return torch.Size([shape[order.index(axis)] for axis in range(len(order))])
    return shape if node.name() == 'AliasBackward0' else torch.Size(node._saved_self_sym_sizes)


def _computed(node: Any, shape: torch.Size) -> Tensor:
    """The result of a step, which has the shape."""
    name = node.name()
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name](node)
    if name in _PRODUCTS:
        return _PRODUCTS[name][0](node)
    before = node.next_functions[0][0]
    if name == 'PermuteBackward0':
        return _computed(before, _shape_before(node, shape)).permute(order_of(node))
    if name == 'MulBackward0':
        return _computed(before, shape) * node._saved_other
    if name == 'AddBackward0':
        return _computed(before, shape) + bias_of(node, 1)
    return _computed(before, _shape_before(node, shape)).reshape(shape)
