"""External attention: a few learned memory slots, the same for every sample, in place of keys and values."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.errors import check_choice
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.layers.attention_core import AttentionCore, statistics_dtype, with_axis_moved
from sem_timm.layers.double_norm import normalize_twice
from sem_timm.layers.recording import may_write_in_place, traced_as_leaf
from sem_timm.plain import is_plain

ExternalNorm: TypeAlias = Literal['double', 'softmax']

EXTERNAL_NORMS: tuple[ExternalNorm, ...] = ('double', 'softmax')

# How much attention is computed at once where it is done by parts: what stays in the cache of a processor.
PART_BYTES = 1 << 22


class ExternalAttention(AttentionCore):
    """External attention as a core, https://arxiv.org/abs/2105.02358.

    The logits of N queries and S learned slots are normalised twice, by a softmax over the tokens and by the L1 norm
    over the slots; the attention then mixes S learned values. Time and memory are linear in N. Keys and values are not
    read. Masked tokens are kept out of the softmax over tokens; their own outputs mean nothing.

    Args:
        head_dim: Width d of the queries.
        value_dim: Width of the output; by default ``head_dim``.
        num_heads: Number of heads with memories of their own; with 1 all heads share one memory.
        head_axis: Which axis of q counts the heads, from the end.
        memory: Number of slots S.
        norm: 'double' as published, or 'softmax' for a softmax over the slots alone, where tokens do not see each other
            and a mask changes nothing.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        mk: Memory of keys, (d, S), or (heads, d, S).
        mv: Memory of values, (S, value_dim), or (heads, S, value_dim).

    Shape:
        - q: (..., N, d).
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit.
    """

    reads_keys: ClassVar[bool] = False

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        memory: int = 64,
        norm: ExternalNorm = 'double',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis)
        check_at_least_one('memory', memory)
        check_choice('norm', norm, EXTERNAL_NORMS)
        self.memory = memory
        self.norm = norm
        self.mk = nn.Parameter(torch.empty(self.parameter_shape(head_dim, memory), device=device, dtype=dtype))
        self.mv = nn.Parameter(torch.empty(self.parameter_shape(memory, self.value_dim), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both memories so that queries of unit variance give logits and outputs of about unit variance."""
        nn.init.normal_(self.mk, std=self.head_dim**-0.5)
        # The squares of the attention of a token sum to about e / (S + e - 1) for logits of unit variance.
        nn.init.normal_(self.mv, std=math.sqrt((self.memory + math.e - 1) / math.e))

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply all outputs by a number, in place in ``mv``."""
        self.mv.mul_(factor)

    def forward(self, q: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, attn_mask)) is not None:
            return node
        self.check_query(q)
        per_head = self.num_heads > 1
        # With the heads in front, the batch and the tokens of (B, N, heads, d) are one axis without a copy.
        tokens = with_axis_moved(q, self.head_axis, 0) if per_head else q.unsqueeze(0)
        mk, mv = (self.mk, self.mv) if per_head else (self.mk.unsqueeze(0), self.mv.unsqueeze(0))
        mask = None if attn_mask is None else self._token_mask(q, attn_mask)
        # Into memory of the type of the input, which is not that of products under autocast.
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu') and may_write_in_place(q, mk, mv):
            out = self._attend_by_parts(tokens, mk, mv, mask)
        else:
            out = torch.bmm(self._attention(tokens, mk, mask), mv)
        # Heads go behind the tokens before these are told apart, for the reason that `_rows` gives.
        out = out.transpose(0, 1).view(*tokens.shape[1:-1], *mv.shape[::2])
        return with_axis_moved(out, tokens.dim() - 2, self.head_axis) if per_head else out.squeeze(-2)

    def attend_folded(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Outputs for queries that are a projection, by the product of its weight and the memory of keys.

        Args:
            x: Tokens (B, N, C).
            weight: Weight (heads * d, C) of the projection.
            bias: Its bias, (heads * d).

        Returns:
            (B, heads, N, value_dim); None where the product does not pay or queries have to be seen: with few tokens,
            gradients or hooks, or while compiling.
        """
        if not self._pays_to_fold(x, weight):
            return None
        heads = self.mk if self.num_heads > 1 else self.mk.unsqueeze(0)
        folded = (heads.transpose(1, 2) @ weight.unflatten(0, (len(heads), -1))).flatten(0, 1)
        folded_bias = None if bias is None else (bias.view(len(heads), 1, -1) @ heads).flatten()
        logits = F.linear(x, folded, folded_bias).unflatten(-1, (len(heads), self.memory))
        attention = normalize_twice(logits, -3, -1).to(x.dtype).flatten(0, 1).transpose(0, 1)
        out = x.new_empty(attention.shape[1], len(heads), self.value_dim)
        torch.bmm(attention, self.mv if self.num_heads > 1 else self.mv.unsqueeze(0), out=out.transpose(0, 1))
        return out.unflatten(0, x.shape[:2]).transpose(1, 2)

    def _pays_to_fold(self, x: Tensor, weight: Tensor) -> bool:
        if torch.is_grad_enabled() or not may_write_in_place(x, weight, self.mk, self.mv):
            return False
        if self.norm != 'double' or self.head_axis != -3 or torch.is_autocast_enabled('cpu'):
            return False
        fits = weight.shape[0] == self.num_heads * self.head_dim and x.dtype == self.mk.dtype
        # The product costs as much as so many tokens' logits.
        return is_plain(self, ExternalAttention) and fits and x.shape[:-1].numel() > weight.shape[1]

    def attention(self, q: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The share (..., N, S) of each slot in what each token reads, for queries (..., N, d)."""
        self.check_query(q)
        per_head = self.num_heads > 1
        tokens = with_axis_moved(q, self.head_axis, 0) if per_head else q.unsqueeze(0)
        mk = self.mk if per_head else self.mk.unsqueeze(0)
        mask = None if attn_mask is None else self._token_mask(q, attn_mask)
        attention = self._attention(tokens, mk, mask).view(*tokens.shape[:-1], self.memory)
        return with_axis_moved(attention, 0, self.head_axis) if per_head else attention.squeeze(0)

    def _attend_by_parts(self, tokens: Tensor, mk: Tensor, mv: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs (heads, R, value_dim) for queries (heads, ..., N, d), R being the product of the axes between.

        A few heads are done at a time, and the result has the heads of a token next to each other, as the layer after
        attention wants them.
        """
        heads, rows = tokens.shape[0], tokens.shape[1:-1].numel()
        out = tokens.new_empty(rows, heads, self.value_dim).transpose(0, 1)
        at_once = max(1, PART_BYTES // max(1, rows * self.memory * tokens.element_size()))
        if at_once >= heads:
            return torch.bmm(self._attention(tokens, mk, mask), mv, out=out)
        masks = [None] * heads if mask is None else mask.expand(heads, *mask.shape[1:]).split(at_once)
        for part, key, value, part_mask, part_out in zip(
            *(x.split(at_once) for x in (tokens, mk, mv)), masks, out.split(at_once)
        ):
            torch.bmm(self._attention(part, key, part_mask), value, out=part_out)
        return out

    def _attention(self, tokens: Tensor, mk: Tensor, mask: Tensor | None) -> Tensor:
        """The attention (heads, R, S) to the slots."""
        logits = torch.bmm(_rows(tokens), mk).view(*tokens.shape[:-1], self.memory)
        dtype = logits.dtype
        if self.norm == 'softmax':
            return logits.softmax(-1, dtype=statistics_dtype(dtype)).to(dtype).flatten(1, tokens.dim() - 2)
        return normalize_twice(logits, -2, -1, mask).to(dtype).flatten(1, tokens.dim() - 2)

    def _token_mask(self, q: Tensor, attn_mask: Tensor) -> Tensor:
        """A mask (..., 1, N) as numbers (heads, ..., N, 1) to be added to logits."""
        mask = self.key_padding(attn_mask, (*q.shape[:-1], q.shape[-2]), statistics_dtype(q.dtype))
        mask = mask.transpose(-2, -1)
        return with_axis_moved(mask, self.head_axis, 0) if self.num_heads > 1 else mask.unsqueeze(0)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, memory={self.memory}, norm={self.norm!r}'


def _rows(tokens: Tensor) -> Tensor:
    """Tokens (heads, ..., N, d) as the rows (heads, R, d) of one matrix per head.

    The heads are behind while the axes are joined, and in front of them again for the product. Were they in front all
    along, the exporter to ONNX would see a product of which both ends are reshaped, and leave the reshapes out where
    shapes allow it: for a batch as large as the number of heads it takes the one for the other.
    """
    last = tokens.dim() - 1
    return tokens.permute(*range(1, last), 0, last).flatten(0, last - 2).transpose(0, 1)
