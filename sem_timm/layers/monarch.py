"""Monarch attention: softmax attention, nearly, by way of blocks of tokens; it needs no training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm.errors import OptionError
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.layers.attention_core import LOWEST, AttentionCore, statistics_dtype, with_axis_moved
from sem_timm.layers.block_grid import Tiles, check_token_grid, grid_of
from sem_timm.layers.recording import traced_as_leaf


class MonarchAttention(AttentionCore):
    """Monarch attention as a core, https://arxiv.org/abs/2505.18698: the old softmax attention, nearly.

    The tokens are a grid, after the prefix tokens (class token, registers), cut into M blocks of B tokens. A block is
    asked by its own queries only, one for each place in it, and answers with the mean of its keys and of its values
    that this query sees, and with the entropy of that softmax. Each query then attends to the answers that its place
    got from all blocks::

        R[m, b, i]  = softmax over i of s q[m, b] . k[m, i]                       s = 1 / sqrt(d)
        K'[b, m]    = sum_i R[m, b, i] k[m, i],   V'[b, m] = sum_i R[m, b, i] v[m, i]
        h[b, m]     = sum_i R[m, b, i] log R[m, b, i]
        out[m', b]  = sum_m L[b, m', m] V'[b, m],   L = softmax over m of s q[m', b] . K'[b, m] - h[b, m]

    In other words, the logarithm of what each block adds up to is taken linearly in the query, around the query that
    asked. Prefix tokens are exact, both ways: they are further terms of the second softmax, and as queries they attend
    to all tokens. With blocks of one token, or one block of all, the result is softmax attention. With more passes a
    block is asked by the mean of the queries at a place, weighted by how much they attended to it in the pass before.

    It has no parameters, and starts close to what was trained with softmax attention; how close depends on how much
    the attention is one of rows and columns. Time and memory grow with N (M + B), that is N sqrt(N), not N^2.

    A grid that blocks do not divide is filled up. What is filled in, or hidden by a mask, is no key, and its place is
    asked by the mean query of the others in the block.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and output; by default ``head_dim``.
        num_heads: Number of heads of the inputs, or 1 for any.
        head_axis: Which axis of q counts the heads, from the end.
        block_size: Height and width of a block in tokens, or one number for both; by default one row of the grid,
            ``(1, width)``.
        passes: How often blocks are asked.
        grid_size: Height and width of the grid. It serves inputs with as many tokens. Any other number of tokens is
            taken for a square; where it is none, blocks are not known, and the result is softmax attention.
        num_prefix_tokens: Number of tokens before the grid.
        device: Accepted for uniformity.
        dtype: Accepted for uniformity.

    Shape:
        - q, k: (..., N, d), v: (..., N, value_dim), with N the number of prefix tokens and the area of the grid.
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit,
            there are more or fewer keys than queries, or a mask is not the same for every query.
    """

    fidelity: ClassVar[str] = (
        'A trained ViT-S, all 12 blocks swapped, kept 97.6 % of its accuracy on Fashion-MNIST (78.4 of 80.3 %).'
    )

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        block_size: int | Sequence[int] | None = None,
        passes: int = 1,
        grid_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis)
        check_at_least_one('passes', passes)
        self.block_size = None if block_size is None else _block_of(block_size)
        self.passes = passes
        self.grid_size = check_token_grid(grid_size, num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens

    def tiles(self, num_tokens: int) -> Tiles | None:
        """How so many tokens, prefix tokens included, lie in blocks; None if they form no grid."""
        grid = grid_of(num_tokens, self.grid_size, self.num_prefix_tokens)
        if grid is None:
            return None
        height, width = grid
        block_height, block_width = self.block_size or (1, width)
        return Tiles(height, width, min(block_height, height), min(block_width, width))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        leading = self.check_inputs(q, k, v)
        if k.shape[-2] != q.shape[-2]:
            raise OptionError(
                f'MonarchAttention got {q.shape[-2]} queries and {k.shape[-2]} keys; it needs one grid for both.'
            )
        tiles = self.tiles(q.shape[-2])
        q, k, v = (x.expand(*leading, -1, -1) for x in (q, k, v))
        mask = None
        if attn_mask is not None:
            mask = self.key_padding(attn_mask, (*leading, q.shape[-2], k.shape[-2]), statistics_dtype(q.dtype))
            mask = mask.expand(*leading, 1, k.shape[-2]).transpose(-2, -1)
        bias = None if mask is None else mask.transpose(-2, -1).to(q.dtype)
        if tiles is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = self._attend_by_blocks(q, k, v, mask, tiles)
        if not self.num_prefix_tokens:
            return out
        prefix = F.scaled_dot_product_attention(q[..., : self.num_prefix_tokens, :], k, v, attn_mask=bias)
        return torch.cat((prefix, out), dim=-2)

    def _attend_by_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: Tiles) -> Tensor:
        """The outputs (..., h w, value_dim) of the tokens of the grid; the mask is (..., N, 1)."""
        first, leading = self.num_prefix_tokens, q.shape[:-2]
        queries = tiles.cut(q[..., first:, :])
        keys_values = tiles.cut(k[..., first:, :], v[..., first:, :])
        hidden = None
        if mask is not None:
            hidden = tiles.cut(mask[..., first:, :], fill=LOWEST)
        elif not tiles.divide_grid:
            nothing = q.new_zeros(q.shape[-2] - first, 1, dtype=statistics_dtype(q.dtype))
            hidden = tiles.cut(nothing, fill=LOWEST).expand(-1, queries.shape[1], -1, -1)
        prefix = of_prefix = None
        if first:
            prefix = self._at_every_place(torch.cat((k[..., :first, :], v[..., :first, :]), dim=-1), tiles)
            of_prefix = None if mask is None else self._at_every_place(mask[..., :first, :], tiles)
        across = queries.flatten(1, 2).transpose(0, 1)  # (R B, M, d): the queries of one place in all blocks
        seen = None if hidden is None else hidden.exp() > 0
        asking = queries if seen is None else _with_means(queries, seen)
        for _ in range(self.passes - 1):
            weights = self._weights(across, *self._answers(asking, keys_values, hidden, prefix, of_prefix))
            asking = _weighted_means(weights[..., first:], queries, seen)
        answers, offsets = self._answers(asking, keys_values, hidden, prefix, of_prefix)
        values = answers[..., self.head_dim :].transpose(0, 1)
        out = self._weights(across, answers, offsets).to(values.dtype) @ values
        return tiles.join(out, leading)

    def _at_every_place(self, prefix: Tensor, tiles: Tiles) -> Tensor:
        """Prefix tokens (..., P, width) as the answers of further blocks, (P, R B, width)."""
        prefix = with_axis_moved(prefix, -2, 0)
        prefix = prefix.reshape(prefix.shape[0], math.prod(prefix.shape[1:-1]), 1, prefix.shape[-1])
        return prefix.expand(-1, -1, tiles.area, -1).flatten(1, 2)

    def _answers(
        self,
        asking: Tensor,
        keys_values: Tensor,
        hidden: Tensor | None,
        prefix: Tensor | None,
        of_prefix: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What blocks and prefix tokens answer to each place, and what is added to the logits of that.

        Args:
            asking: The query of each place that each block is asked by, (M, R, B, d).
            keys_values: Keys and values side by side, (M, R, B, d + value_dim).
            hidden: What is added to the logits of keys, (M, R, B, 1).
            prefix: Keys and values of the prefix tokens, (P, R B, d + value_dim), where there are some.
            of_prefix: What is added to the logits of prefix tokens, (P, R B, 1).

        Returns:
            Means of keys and values (P + M, R B, d + value_dim), and (P + M, R B).
        """
        width, dtype = self.head_dim, statistics_dtype(asking.dtype)
        queries, tokens = asking.flatten(0, 1), keys_values.flatten(0, 1)
        added = queries.new_zeros(1, 1, 1) if hidden is None else hidden.flatten(0, 1).transpose(-2, -1)
        logits = torch.baddbmm(
            added.to(queries.dtype),
            queries,
            tokens[..., :width].transpose(-2, -1),
            beta=0 if hidden is None else 1,
            alpha=self.scale,
        )
        found = logits.softmax(-1, dtype=dtype)
        means = found.to(tokens.dtype) @ tokens
        # The logarithm of what a softmax is divided by, from its largest entry: no further pass over all exponentials.
        total = logits.amax(-1).to(dtype) - found.amax(-1).log()
        offsets = total - (queries * means[..., :width]).sum(-1, dtype=dtype) * self.scale
        places = asking.shape[1] * asking.shape[2]
        means = means.view(asking.shape[0], places, tokens.shape[-1])
        offsets = offsets.view(asking.shape[0], places)
        if prefix is None:
            return means, offsets
        offset = offsets.new_zeros(prefix.shape[:2]) if of_prefix is None else of_prefix.squeeze(-1).to(dtype)
        return torch.cat((prefix.to(means.dtype), means)), torch.cat((offset, offsets))

    def _weights(self, across: Tensor, answers: Tensor, offsets: Tensor) -> Tensor:
        """How much queries (R B, M, d) attend to the answers their place got, (R B, M, P + M)."""
        keys = answers[..., : self.head_dim].permute(1, 2, 0)
        offsets = offsets.t().unsqueeze(1).to(across.dtype)
        logits = torch.baddbmm(offsets, across, keys, alpha=self.scale)
        return logits.softmax(-1, dtype=statistics_dtype(logits.dtype))

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return 1 / math.sqrt(self.head_dim)

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, block_size={self.block_size}, passes={self.passes}, '
            f'grid_size={self.grid_size}, num_prefix_tokens={self.num_prefix_tokens}'
        )


def _block_of(block_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a block, as an option tells them.

    Raises:
        OptionError: If it does not.
    """
    sides = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise OptionError(
            f'block_size={block_size!r}: write height and width of a block, such as (1, 14), or one number for both.'
        )
    for side in sides:
        check_at_least_one('block_size', side)
    return sides[0], sides[1]


def _with_means(queries: Tensor, seen: Tensor) -> Tensor:
    """Queries (M, R, B, d), those that are not seen (M, R, B, 1) replaced by the mean of the others in their block."""
    count = seen.sum(-2, keepdim=True).clamp(min=1).to(queries.dtype)
    return torch.where(seen, queries, (queries * seen).sum(-2, keepdim=True) / count)


def _weighted_means(weights: Tensor, queries: Tensor, seen: Tensor | None) -> Tensor:
    """For each block the mean of the queries of each place that attend to it, (M, R, B, d).

    Args:
        weights: How much queries attend to blocks, (R B, M, M).
        queries: All queries, (M, R, B, d).
        seen: Which of them count, (M, R, B, 1).
    """
    if seen is not None:
        weights = weights * seen.flatten(1, 2).transpose(0, 1)
    weights = weights / weights.sum(-2, keepdim=True).clamp(min=1e-12)
    across = queries.flatten(1, 2).transpose(0, 1)
    means = weights.transpose(-2, -1).to(queries.dtype) @ across
    return means.transpose(0, 1).reshape(queries.shape)
