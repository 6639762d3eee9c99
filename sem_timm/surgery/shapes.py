"""Output shapes of the commonest operations on the meta device, found directly.

torch runs several of these through Python decompositions on meta tensors, at half a millisecond and more a call; a
whole forward is mostly made of them. Each entry returns an empty tensor of the shape that torch would return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _same(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(input)


def _contiguous(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _activation(input: Tensor, inplace: bool | str = False, **kwargs: Any) -> Tensor:
    return input if inplace is True else torch.empty_like(input)


def _batch_norm(input: Tensor, running_mean: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if running_mean is not None and running_mean.numel() != input.shape[1]:
        raise RuntimeError(f'batch norm over {running_mean.numel()} channels got an input with {input.shape[1]}')
    return torch.empty_like(input)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f'linear layer with {weight.shape[-1]} inputs got {input.shape[-1]}')
    return input.new_empty((*input.shape[:-1], *weight.shape[:-1]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


SHAPES: dict[str, Callable[..., Tensor]] = {
    'batch_norm': _batch_norm,
    'linear': _linear,
    'scaled_dot_product_attention': _attention,
    'layer_norm': _contiguous,
    'group_norm': _same,
    **dict.fromkeys(('relu', 'gelu', 'silu', 'hardswish', 'hardsigmoid', 'relu6'), _activation),
}
