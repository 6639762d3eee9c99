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
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from sem_timm.layers.kept import Kept, kept_of, may_read_the_graph, sums_of
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
    if not may_read_the_graph():
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
    means, same = _Pooled.apply(y, pool, channel_dim, num_prefix_tokens)
    gate = gate_of(means).to(y.dtype)
    # What is kept of y is how to compute it once more.
    recipe = [source]
    with saved_tensors_hooks(lambda _: recipe[0], _again):
        z: Tensor = _Gated.apply(y, same, gate, recipe, shortcut, shortcut_first, channel_dim)
    return z


def _again(source: Source) -> Tensor:
    return source.again()


class _Pooled(Function):
    """The means of y over positions, and y itself; its backward is that of all that is done with y.

    The gradient of y is ``gate * dz + dp / N``, of the gradients of the gated sum and of the means of N positions. Here
    the two meet, and so are summed up in place. The gate is not kept here: it comes later, and so would hold the graph
    that holds it, for ever if there is no backward.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, pool: Callable[[Tensor], Tensor], channel_dim: int, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        ctx.channel_dim, ctx.num_prefix_tokens, ctx.shape = channel_dim, num_prefix_tokens, y.shape
        ctx.set_materialize_grads(False)
        return pool(y), y.detach()

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if dp is None:
            return dy, None, None, None
        if dy is None:  # a gradient of gradients may reach the gate alone
            dy = dp.new_zeros(ctx.shape)
        elif torch.is_grad_enabled():
            dy = dy.clone()
        # Or else nobody has it but this: `_Gated` has computed it for here.
        pooled = dy[:, ctx.num_prefix_tokens :] if ctx.num_prefix_tokens else dy
        count = math.prod(pooled.shape[axis] for axis in positions(pooled, ctx.channel_dim))
        pooled += spread(dp / count, dy, ctx.channel_dim)
        return dy, None, None, None


class _Gated(Function):
    """``y * gate``, plus the shortcut. The gradient of y goes to `_Pooled`, as that of ``same``."""

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
            recipe[0] = Difference(
                source.node, y.shape, True, source.biases, shortcut, spread(gate.detach(), y, channel_dim), z
            )
        # The context lives longer than what is saved, and so has nothing that holds large tensors.
        ctx.kept = source if isinstance(source, Kept) else None
        ctx.positions, ctx.channel_dim = positions(y, channel_dim), channel_dim
        ctx.gate = gate  # small, and computed before
        ctx.save_for_backward(y)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is not None and not torch.is_grad_enabled():
            dg = ctx.kept.dot(dz)
        else:
            (y,) = ctx.saved_tensors
            dg = (dz * y).sum(ctx.positions) if torch.is_grad_enabled() else sums_of(y, dz, ctx.positions)[0]
        dy = dz * spread(ctx.gate, dz, ctx.channel_dim)
        return None, dy, dg, None, dz if ctx.needs_input_grad[4] else None, None, None
