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
    if 'dtype' in kwargs or 'out' in kwargs or not input.is_floating_point():
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
    if kwargs.keys() - {'alpha', 'value'} or not tensors:  # such as operands by name
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


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if input.ndim != weight.ndim or isinstance(padding, str) or not input.is_contiguous():
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


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return _activation(input, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return _activation(input, inplace)


def _normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    return input.detach() if out is None and input.is_floating_point() else NotImplemented


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Any:
    bounded = input.is_floating_point() and not isinstance(min, Tensor) and not isinstance(max, Tensor)
    return input.detach() if bounded else NotImplemented


def _power(input: Any, exponent: Any) -> Any:
    raised = isinstance(input, Tensor) and input.is_floating_point() and isinstance(exponent, (int, float))
    return input.detach() if raised else NotImplemented


def _roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device='meta')


def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    dim %= max(first.ndim, 1)
    sizes = [(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors]
    alike = all(t.ndim == first.ndim and t.dtype == first.dtype for t in tensors)
    # Maps have a layout in memory that a concatenation keeps.
    plain = first.ndim < 4 or all(tensor.is_contiguous() for tensor in tensors)
    if not alike or not plain or any(size != sizes[0] for size in sizes):
        return NotImplemented
    whole = (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :])
    return torch.empty(whole, dtype=first.dtype, device='meta')


def _matmul(input: Tensor, other: Tensor) -> Any:
    batches = input.shape[:-2]
    if input.ndim < 3 or other.ndim not in (2, input.ndim) or input.dtype != other.dtype:
        return NotImplemented
    if input.shape[-1] != other.shape[-2] or (other.ndim > 2 and other.shape[:-2] != batches):
        return NotImplemented
    return torch.empty((*input.shape[:-1], other.shape[-1]), dtype=input.dtype, device='meta')


def _adaptive_pool(input: Tensor, output_size: Any) -> Any:
    if input.ndim != 4 or not input.is_contiguous():
        return NotImplemented
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    kept = (extent if new is None else new for new, extent in zip(size, input.shape[2:]))
    return torch.empty((*input.shape[:2], *kept), dtype=input.dtype, device='meta')


def _lstm(input: Tensor, hidden: Any, *args: Any) -> Any:
    """Of torch's two forms the one without packed sequences; by steps, it would run through all of them."""
    if isinstance(hidden, Tensor) or input.ndim != 3 or len(args) != 7 or input.dtype != hidden[0].dtype:
        return NotImplemented
    is_bidirectional, batch_first = args[5:]
    width = hidden[0].shape[-1] * (2 if is_bidirectional else 1)
    steps = input.transpose(0, 1) if batch_first else input
    out = torch.empty((*steps.shape[:-1], width), dtype=input.dtype, device='meta')
    return (
        out.transpose(0, 1) if batch_first else out,
        *(torch.empty(state.shape, dtype=state.dtype, device='meta') for state in hidden),
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device='meta')


SHAPES: dict[str, Callable[..., Any]] = {
    'batch_norm': _batch_norm,
    'linear': _linear,
    **dict.fromkeys(('conv1d', 'conv2d'), _convolution),
    'scaled_dot_product_attention': _attention,
    'layer_norm': _layer_norm,
    'rms_norm': _layer_norm,
    'stack': _stack,
    'cat': _cat,
    'roll': _roll,
    'clamp': _clamp,
    'pow': _power,
    'normalize': _normalize,
    'lstm': _lstm,
    'adaptive_avg_pool2d': _adaptive_pool,
    'hardtanh': _hardtanh,
    'leaky_relu': _leaky_relu,
    **dict.fromkeys(('matmul', '__matmul__'), _matmul),
    **dict.fromkeys(('mean', 'prod'), _mean),
    **dict.fromkeys(('group_norm', 'sigmoid', 'tanh', 'softmax', 'neg', 'exp'), _same),
    **dict.fromkeys(('relu', 'gelu', 'silu', 'hardswish', 'hardsigmoid', 'relu6'), _activation),
    **dict.fromkeys(
        ('add', 'mul', 'sub', '__add__', '__mul__', '__sub__', '__radd__', '__rmul__', 'div', '__truediv__'),
        _elementwise,
    ),
    'addcmul': _elementwise,
    **dict.fromkeys(('relu_', 'sigmoid_'), _itself),
    **dict.fromkeys(('add_', 'mul_', '__iadd__', '__imul__'), _in_place),
}
