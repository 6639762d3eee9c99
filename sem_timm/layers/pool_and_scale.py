"""What a channel gate does to its input: the mean over positions, and the product with the gate beside a shortcut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.recording import is_recorded, may_write_over, one_node


@one_node
def pooled(x: Tensor, channel_dim: int, num_prefix_tokens: int, name: str) -> Tensor:
    """The mean over all positions but the prefix tokens, (B, C)."""
    if x.ndim < 3:
        raise OptionError(
            f'{name} got an input of shape {tuple(x.shape)}; it needs a batch, a channel and at least one spatial axis.'
        )
    if not num_prefix_tokens:
        return _mean(x, positions(x, channel_dim))
    if x.ndim != 3 or x.shape[1] <= num_prefix_tokens:
        raise OptionError(
            f'{name} with num_prefix_tokens={num_prefix_tokens} got an input of shape {tuple(x.shape)}; it needs '
            f'(B, N, C) with N above {num_prefix_tokens}.'
        )
    return _mean(x[:, num_prefix_tokens:], (1,))


def positions(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """The axes of positions of (B, C, *spatial), or of (B, *spatial, C)."""
    return tuple(range(2, x.ndim)) if channel_dim == 1 else tuple(range(1, x.ndim - 1))


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over some axes."""
    if x.dtype not in (torch.float32, torch.float64) or is_recorded():
        return x.mean(dims)  # a sum of half precision would be rounded, or overflow
    # The same, bit for bit, with a gradient that is spread over the axes without filling the memory of a whole input.
    return x.sum(dims) / math.prod([x.shape[dim] for dim in dims])


@one_node
def scaled(
    x: Tensor, gate: Tensor, gain: Tensor, shortcut: Tensor | None, shortcut_first: bool, channel_dim: int
) -> Tensor:
    """The product with a gate (B, C), whose gain is still to be counted in, and the sum with the shortcut."""
    if gate.dtype != x.dtype:
        # Under autocast, a float32 parameter makes the gate of a half-precision input float32.
        gate = gate.to(x.dtype)
    gate = gate * gain
    in_one_pass = not is_recorded() and not (torch.is_grad_enabled() and may_write_over())
    if in_one_pass and shortcut is not None and lie_alike(x, shortcut):
        return torch.addcmul(shortcut, x, spread(gate, x, channel_dim))
    return product_and_sum(x, gate, shortcut, shortcut_first, channel_dim)


def product_and_sum(x: Tensor, gate: Tensor, shortcut: Tensor | None, shortcut_first: bool, channel_dim: int) -> Tensor:
    """The product with a gate (B, C), and the sum with the shortcut, in two passes."""
    product = x * spread(gate, x, channel_dim)
    if shortcut is None:
        return product
    if not is_recorded() and may_write_over() and lie_alike(x, shortcut):
        return product.add_(shortcut)  # with gradients that take fewer passes than those of addcmul
    return shortcut + product if shortcut_first else product + shortcut


def spread(gate: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """(B, C) with the axes that a product with x needs."""
    for _ in range(x.ndim - 2):
        gate = gate.unsqueeze(-1 if channel_dim == 1 else 1)
    return gate


def lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are of one type and shape, and in the same order in memory."""
    return x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
