"""A product with a gate and the sum with a shortcut, without keeping the tensor that is gated.

    y = norm(x)                     # kept for the backward: x
    p = y.mean((2, 3))
    z = y * gate(p) + shortcut      # kept besides, by these steps: nothing of the size of y

All that the backward needs of y are its products with a gradient, summed up over positions, for the gradient of the
gate. They follow from x, see `kept`, or y is computed again, see `recomputed`. The forward computes what it computes
without this, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from sem_timm.layers.kept import Kept, kept_of, sums_of
from sem_timm.layers.pool_and_scale import positions, product_and_sum, spread
from sem_timm.layers.recomputed import Difference, Recomputed, recomputed_of
from sem_timm.layers.recording import is_eager

Source: TypeAlias = Kept | Recomputed


def follows(y: Tensor, shortcut: Tensor | None, channel_dim: int) -> Source | None:
    """What the input of a gate follows from, where `gated_sum` can take it; None where `scaled` has to.

    Tracers, compilers and transforms see the plain steps, and torch.compile finds out by itself what to compute again.
    """
    if not is_eager(y, *(() if shortcut is None else (shortcut,))) or y.ndim < 3:
        return None
    if shortcut is not None and (shortcut.dtype != y.dtype or shortcut.shape != y.shape):
        return None
    return kept_of(y, positions(y, channel_dim)) or recomputed_of(y, dear=shortcut is not None)


def gated_sum(
    y: Tensor,
    source: Source,
    pool: Callable[[Tensor], Tensor],
    gate_of: Callable[[Tensor], Tensor],
    shortcut: Tensor | None,
    shortcut_first: bool,
    channel_dim: int,
    num_prefix_tokens: int,
) -> Tensor:
    """``y * gate_of(pool(y))``, plus the shortcut.

    Args:
        y: (B, C, ...) or (B, ..., C).
        source: What it follows from.
        pool: To the means (B, C) over its positions.
        gate_of: From the means to a gate (B, C).
        shortcut: As y, or None.
        shortcut_first: The order of the sum, in which the result lies in memory as the first does.
        channel_dim: The axis of channels, 1 or -1.
        num_prefix_tokens: How many leading positions the means leave out.
    """
    branch = _Branch(channel_dim, num_prefix_tokens)
    means, same = _Pooled.apply(y, pool, branch)
    branch.gate = gate_of(means).to(y.dtype)
    # What is kept of y is how to compute it once more.
    recipe = [source]
    with saved_tensors_hooks(lambda _: recipe[0], _again):
        z: Tensor = _Gated.apply(y, same, branch.gate, recipe, shortcut, shortcut_first, channel_dim)
    return z


def _again(source: Source) -> Tensor:
    return source.again()


@dataclass
class _Branch:
    """What the backward of `_Pooled` has to know; the gate (B, C) once it was computed."""

    channel_dim: int
    num_prefix_tokens: int
    gate: Tensor = field(init=False)


class _Pooled(Function):
    """The means of y over positions, and y itself; its backward is that of all that is done with y.

    The gradient of y is ``gate * dz + dp / N``, of the gradients of the gated sum and of the means of N positions. Here
    the two meet, and so are summed up in place.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, pool: Callable[[Tensor], Tensor], branch: _Branch) -> tuple[Tensor, Tensor]:
        ctx.branch, ctx.shape = branch, y.shape
        ctx.set_materialize_grads(False)
        return pool(y), y.detach()

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, None, None]:
        branch: _Branch = ctx.branch
        if dz is None:  # a gradient of gradients may reach the gate alone
            if dp is None:
                return None, None, None
            dz = dp.new_zeros(ctx.shape)
        dy = dz * spread(branch.gate, dz, branch.channel_dim)
        if dp is not None:
            pooled = dy[:, branch.num_prefix_tokens :] if branch.num_prefix_tokens else dy
            count = math.prod(pooled.shape[axis] for axis in positions(pooled, branch.channel_dim))
            pooled += spread(dp / count, dz, branch.channel_dim)
        return dy, None, None


class _Gated(Function):
    """``y * gate``, plus the shortcut. What it hands to `_Pooled` as the gradient of y is still to be gated there."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        same: Tensor,
        gate: Tensor,
        recipe: list[Source],
        shortcut: Tensor | None,
        shortcut_first: bool,
        channel_dim: int,
    ) -> Tensor:
        z = product_and_sum(y, gate, shortcut, shortcut_first, channel_dim)
        (source,) = recipe
        if isinstance(source, Recomputed) and source.is_dear and shortcut is not None:
            recipe[0] = Difference(source.node, y.shape, True, shortcut, spread(gate.detach(), y, channel_dim), z)
        # The context lives longer than what is saved, and so has nothing that holds tensors.
        ctx.kept = source if isinstance(source, Kept) else None
        ctx.positions = positions(y, channel_dim)
        ctx.save_for_backward(y)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is not None and not torch.is_grad_enabled():
            dg = ctx.kept.dot(dz)
        else:
            (y,) = ctx.saved_tensors
            dg = (dz * y).sum(ctx.positions) if torch.is_grad_enabled() else sums_of(y, dz, ctx.positions)[0]
        return None, dz, dg, None, dz if ctx.needs_input_grad[4] else None, None, None
