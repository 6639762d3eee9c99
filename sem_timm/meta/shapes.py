"""Results of the commonest operations on the meta device, found without torch.

torch runs some of these through decompositions in Python on meta tensors, at a tenth of a millisecond to a whole one a
call, and a forward is mostly made of them. Each function returns a new meta tensor of the shape, type and strides that
torch would give, raises where torch would for a wrong number of channels, or leaves the case to torch by returning
``NotImplemented``. A result shares no memory with an operand, unless the call works in place and returns the operand
itself: who asks whose memory a tensor is relies on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def like_input(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Activations, softmax and the like: as the input, or the input itself."""
    if kwargs.get('dtype') or kwargs.get('out') is not None or not input.is_floating_point():
        return NotImplemented
    is_in_place = kwargs.get('inplace') is True or True in args[:1]
    return input if is_in_place else torch.empty_like(input)


def clamped(input: Tensor, min: Any = None, max: Any = None) -> Any:
    """``torch.clamp`` by numbers."""
    by_tensors = isinstance(min, Tensor) or isinstance(max, Tensor)
    return NotImplemented if by_tensors or not input.is_floating_point() else torch.empty_like(input)


def in_place(input: Tensor, *others: Any, **kwargs: Any) -> Any:
    """Sums, products and activations that write into their first operand and return it."""
    fits = all(_fits(other.shape, input.shape) for other in others if isinstance(other, Tensor))
    return input if fits and not kwargs.keys() - {'alpha', 'value'} else NotImplemented


def elementwise(*operands: Any, **kwargs: Any) -> Any:
    """Sums and products of tensors of one type, and of numbers."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if kwargs.keys() - {'alpha', 'value'} or not tensors:  # such as operands by name
        return NotImplemented
    numbers = all(isinstance(operand, (Tensor, int, float)) for operand in operands)
    first = tensors[0]
    if not numbers or not first.is_floating_point() or any(tensor.dtype != first.dtype for tensor in tensors):
        return NotImplemented
    # One of them must have the shape that all are broadcast to; otherwise torch finds it.
    whole = next((t for t in tensors if all(_fits(other.shape, t.shape) for other in tensors)), None)
    return NotImplemented if whole is None else torch.empty_like(whole)


def _fits(shape: torch.Size, whole: torch.Size) -> bool:
    spare = len(whole) - len(shape)
    return spare >= 0 and all(size in (1, full) for size, full in zip(shape, whole[spare:]))


def reduced(input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Sums and means over some axes."""
    if dim is None or kwargs:
        return NotImplemented
    gone = {axis % input.ndim for axis in ((dim,) if isinstance(dim, int) else dim)}
    kept = [1 if axis in gone else size for axis, size in enumerate(input.shape) if keepdim or axis not in gone]
    return input.new_empty(kept)


def stacked(tensors: Any, dim: int = 0) -> Any:
    """``torch.stack``."""
    first = tensors[0]
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors):
        return NotImplemented
    shape = list(first.shape)
    shape.insert(dim % (first.ndim + 1), len(tensors))
    return first.new_empty(shape)


def layer_normed(input: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Layer norm and RMS norm."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f'layer norm over {shape} got an input of {tuple(input.shape)}')
    return input.new_empty(input.shape)


def batch_normed(input: Tensor, running_mean: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Batch norm."""
    if running_mean is not None and running_mean.numel() != input.shape[1]:
        raise RuntimeError(f'batch norm over {running_mean.numel()} channels got an input with {input.shape[1]}')
    return torch.empty_like(input)


def projected(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layers."""
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f'linear layer with {weight.shape[-1]} inputs got {input.shape[-1]}')
    return input.new_empty((*input.shape[:-1], *weight.shape[:-1]))


def convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolutions of contiguous maps."""
    if input.ndim != weight.ndim or isinstance(padding, str) or not input.is_contiguous():
        return NotImplemented
    if input.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(f'convolution of {weight.shape[1] * groups} channels got an input with {input.shape[1]}')
    # As torch.nn.Conv2d documents the size of its output.
    size = [
        (extent + 2 * _at(padding, axis) - _at(dilation, axis) * (weight.shape[2 + axis] - 1) - 1) // _at(stride, axis)
        + 1
        for axis, extent in enumerate(input.shape[2:])
    ]
    if min(size) < 1:
        raise RuntimeError(f'convolution with a kernel of {tuple(weight.shape[2:])} got {tuple(input.shape[2:])}')
    return input.new_empty((input.shape[0], weight.shape[0], *size))


def _at(value: Any, axis: int) -> int:
    return int(value if isinstance(value, int) else value[axis % len(value)])


def joined(tensors: Any, dim: int = 0) -> Any:
    """``torch.cat``."""
    first = tensors[0]
    dim %= max(first.ndim, 1)
    sizes = [(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors]
    # torch promotes types and lets an empty tensor of one axis pass; both are left to it.
    alike = all(t.ndim == first.ndim and t.dtype == first.dtype for t in tensors)
    # Maps have a layout in memory that a concatenation keeps.
    plain = first.ndim < 4 or all(tensor.is_contiguous() for tensor in tensors)
    if not alike or not plain or any(size != sizes[0] for size in sizes):
        return NotImplemented
    return first.new_empty((*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :]))


def multiplied(input: Tensor, other: Tensor) -> Any:
    """Products of matrices, in batches of equal shape."""
    if input.ndim < 3 or other.ndim not in (2, input.ndim) or input.dtype != other.dtype:
        return NotImplemented
    if input.shape[-1] != other.shape[-2] or (other.ndim > 2 and other.shape[:-2] != input.shape[:-2]):
        return NotImplemented
    return input.new_empty((*input.shape[:-1], other.shape[-1]))


def filled(input: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Any:
    """``Tensor.new_full`` by a tensor, whose number torch would ask for."""
    return input.new_empty(size, **kwargs) if isinstance(fill_value, Tensor) else NotImplemented


def attended(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention``."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def rolled(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """``torch.roll``."""
    return input.new_empty(input.shape)


def recurrent(input: Tensor, hidden: Any, *args: Any) -> Any:
    """An LSTM without packed sequences, which torch would run step by step."""
    if isinstance(hidden, Tensor) or input.ndim != 3 or len(args) != 7 or input.dtype != hidden[0].dtype:
        return NotImplemented
    is_bidirectional, batch_first = args[5:]
    width = hidden[0].shape[-1] * (2 if is_bidirectional else 1)
    steps = input.transpose(0, 1) if batch_first else input
    out = input.new_empty((*steps.shape[:-1], width))
    return (out.transpose(0, 1) if batch_first else out, *(state.new_empty(state.shape) for state in hidden))
