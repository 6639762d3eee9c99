"""Output shapes of the commonest operations on the meta device, found directly.

torch runs many of these through Python decompositions on meta tensors, at a tenth of a millisecond to a whole one a
call, and a forward is mostly made of them. Each entry returns a meta tensor of the shape, type and memory layout that
torch would return, raises where torch would for a wrong number of channels, or leaves the case to torch by returning
`NotImplemented`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _same(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if 'dtype' in kwargs or 'out' in kwargs:
        return NotImplemented
    return input.detach()  # the cheapest new tensor there is; without data, sharing it means nothing


def _activation(input: Tensor, inplace: bool | str = False, **kwargs: Any) -> Tensor:
    return input if inplace is True else input.detach()


def _itself(input: Tensor) -> Tensor:
    return input


def _in_place(input: Tensor, other: Any, **kwargs: Any) -> Any:
    fits = not isinstance(other, Tensor) or _fits(other.shape, input.shape)
    return input if fits else NotImplemented


def _elementwise(*operands: Any, **kwargs: Any) -> Any:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if kwargs.keys() - {'alpha'} or not tensors:  # such as operands by name
        return NotImplemented
    numbers = all(isinstance(operand, (Tensor, int, float)) for operand in operands)
    first = tensors[0]
    if not numbers or not first.is_floating_point() or any(tensor.dtype != first.dtype for tensor in tensors):
        return NotImplemented
    # One of them must have the shape that all are broadcast to; otherwise torch finds it.
    whole = next((t for t in tensors if all(_fits(other.shape, t.shape) for other in tensors)), None)
    return NotImplemented if whole is None else whole.detach()


def _fits(shape: torch.Size, whole: torch.Size) -> bool:
    spare = len(whole) - len(shape)
    return spare >= 0 and all(size in (1, full) for size, full in zip(shape, whole[spare:]))


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if dim is None or kwargs:
        return NotImplemented
    gone = {axis % input.ndim for axis in ((dim,) if isinstance(dim, int) else dim)}
    kept = [1 if axis in gone else size for axis, size in enumerate(input.shape) if keepdim or axis not in gone]
    return torch.empty(kept, dtype=input.dtype, device='meta')


def _stack(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors):
        return NotImplemented
    shape = list(first.shape)
    shape.insert(dim % (first.ndim + 1), len(tensors))
    return torch.empty(shape, dtype=first.dtype, device='meta')


def _layer_norm(input: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f'layer norm over {shape} got an input of {tuple(input.shape)}')
    return torch.empty(input.shape, dtype=input.dtype, device='meta')


def _batch_norm(input: Tensor, running_mean: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if running_mean is not None and running_mean.numel() != input.shape[1]:
        raise RuntimeError(f'batch norm over {running_mean.numel()} channels got an input with {input.shape[1]}')
    return input.detach()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f'linear layer with {weight.shape[-1]} inputs got {input.shape[-1]}')
    return torch.empty((*input.shape[:-1], *weight.shape[:-1]), dtype=input.dtype, device='meta')


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if input.ndim != 4 or isinstance(padding, str) or not input.is_contiguous():
        return NotImplemented
    if input.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(f'convolution of {weight.shape[1] * groups} channels got an input with {input.shape[1]}')
    size = [
        (extent + 2 * _at(padding, axis) - _at(dilation, axis) * (weight.shape[2 + axis] - 1) - 1) // _at(stride, axis)
        + 1
        for axis, extent in enumerate(input.shape[2:])
    ]
    if min(size) < 1:
        raise RuntimeError(f'convolution with a kernel of {tuple(weight.shape[2:])} got {tuple(input.shape[2:])}')
    return torch.empty((input.shape[0], weight.shape[0], *size), dtype=input.dtype, device='meta')


def _at(value: Any, axis: int) -> int:
    return int(value if isinstance(value, int) else value[axis % len(value)])


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device='meta')


SHAPES: dict[str, Callable[..., Any]] = {
    'batch_norm': _batch_norm,
    'linear': _linear,
    'conv2d': _conv2d,
    'scaled_dot_product_attention': _attention,
    'layer_norm': _layer_norm,
    'stack': _stack,
    **dict.fromkeys(('mean', 'prod'), _mean),
    **dict.fromkeys(('group_norm', 'sigmoid', 'tanh', 'softmax'), _same),
    **dict.fromkeys(('relu', 'gelu', 'silu', 'hardswish', 'hardsigmoid', 'relu6'), _activation),
    **dict.fromkeys(('add', 'mul', 'sub', '__add__', '__mul__', '__sub__', '__radd__', '__rmul__'), _elementwise),
    'addcmul': _elementwise,
    **dict.fromkeys(('relu_', 'sigmoid_'), _itself),
    **dict.fromkeys(('add_', 'mul_', '__iadd__', '__imul__'), _in_place),
}
