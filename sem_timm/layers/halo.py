"""Halo attention: every block of a grid of tokens attends to itself and a rim around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.errors import OptionError
from sem_timm.layers.arguments import check_at_least_one, check_not_negative
from sem_timm.layers.attention_core import LOWEST, AttentionCore, statistics_dtype
from sem_timm.layers.block_grid import BlockGrid, check_token_grid, required_grid
from sem_timm.layers.recording import traced_as_leaf


class HaloAttention(AttentionCore):
    """Halo attention as a core, https://arxiv.org/abs/2103.12731.

    The tokens are a grid, after the prefix tokens (class token, registers). The grid is cut into blocks; the queries of
    a block attend to the keys of the block and of a halo around it, with learned logits for the relative position, and
    to all prefix tokens. Prefix tokens attend to all tokens, and have no relative position. Where the grid ends, or is
    no multiple of the block size, it is filled up, and what is filled in is masked out. Time and memory are linear in
    tokens.

    Covered is the attention. Not covered are queries at a lower resolution than keys, and the network around it. Unlike
    in the publication, the relative logits start at zero, so that content alone counts until they are trained, and
    positions outside the image are masked.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and output; by default ``head_dim``.
        num_heads: Number of heads with relative positions of their own; with 1 all heads share them.
        head_axis: Which axis of q counts the heads, from the end.
        block_size: Side of a block.
        halo_size: Width of the halo.
        grid_size: Height and width of the grid. It serves inputs with as many tokens; any other number of tokens must
            be a square.
        num_prefix_tokens: Number of tokens before the grid.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        relative_height: (2 block_size + 2 halo_size - 1, d), or with heads in front: one vector for each vertical
            offset from query to key, the most negative first. Its product with the query is added to the logit.
        relative_width: The same for horizontal offsets.

    Shape:
        - q, k: (..., N, d), v: (..., N, value_dim), with N the number of prefix tokens and the area of the grid.
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit, its
            tokens are no grid, or a mask is not the same for every query.
    """

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        grid_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis)
        check_at_least_one('block_size', block_size)
        check_not_negative('halo_size', halo_size)
        self.block_size = block_size
        self.halo_size = halo_size
        self.grid_size = check_token_grid(grid_size, num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        shape = self.parameter_shape(2 * (block_size + halo_size) - 1, head_dim)
        self.relative_height = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.relative_width = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the relative positions at zero."""
        nn.init.zeros_(self.relative_height)
        nn.init.zeros_(self.relative_width)

    def grid(self, num_tokens: int) -> tuple[int, int]:
        """Height and width of the grid that so many tokens form, prefix tokens included.

        Raises:
            OptionError: If they form none.
        """
        return required_grid(num_tokens, self.grid_size, self.num_prefix_tokens, 'HaloAttention')

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        leading = self.check_inputs(q, k, v)
        if k.shape[-2] != q.shape[-2]:
            raise OptionError(
                f'HaloAttention got {q.shape[-2]} queries and {k.shape[-2]} keys; it needs one grid for both.'
            )
        height, width = self.grid(q.shape[-2])
        blocks = BlockGrid(height, width, self.block_size, self.halo_size)
        q, k, v = (x.expand(*leading, -1, -1) for x in (q, k, v))
        mask = None
        if attn_mask is not None:
            mask = self.key_padding(attn_mask, (*q.shape[:-1], k.shape[-2]), statistics_dtype(q.dtype))
            mask = self.heads_first(mask.expand(*leading, -1, k.shape[-2])).to(q.dtype)
        queries, keys, values = (self.heads_first(x) for x in (q, k, v))
        out = self._attend_in_blocks(queries, keys, values, mask, blocks)
        if self.num_prefix_tokens:
            prefix = queries[..., : self.num_prefix_tokens, :]
            out = torch.cat((F.scaled_dot_product_attention(prefix, keys, values, attn_mask=mask), out), dim=-2)
        return self.heads_back(out, q)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: BlockGrid) -> Tensor:
        """The outputs (heads, R, h w, value_dim) of the tokens of the grid; the mask is (heads, R, 1, N)."""
        first = self.num_prefix_tokens
        blocks = grid.blocks(q[..., first:, :])
        if mask is None:
            mask = q.new_zeros(1, 1, 1, q.shape[-2])
        extra = _with_windows(mask.transpose(-2, -1), first, grid, LOWEST).transpose(-2, -1)
        bias = F.pad(self._relative_logits(blocks, grid), (first, 0)) + extra
        keys, values = (_with_windows(x, first, grid) for x in (k, v))
        # Blocks take the place of a batch, since four axes are what the fused kernels want.
        batch = [x.flatten(1, 2) for x in (blocks, keys, values, bias)]
        out = F.scaled_dot_product_attention(batch[0], batch[1], batch[2], attn_mask=batch[3])
        return grid.tokens(out.view(*blocks.shape[:3], *out.shape[2:]))

    def _relative_logits(self, blocks: Tensor, grid: BlockGrid) -> Tensor:
        """Logits of the relative positions, (heads, R, n, block_size^2, window_size^2), for blocks of queries."""
        height, width = (
            self._offsets(table, grid.window_size) for table in (self.relative_height, self.relative_width)
        )
        queries = blocks.view(*blocks.shape[:3], self.block_size, self.block_size, self.head_dim)
        vertical = torch.einsum('hrnyxd,hydk->hrnyxk', queries, height)
        horizontal = torch.einsum('hrnyxd,hxdk->hrnyxk', queries, width)
        return (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(-2).flatten(3, 4)

    def _offsets(self, table: Tensor, window_size: int) -> Tensor:
        """The offsets to all of a window for each position in the block, (heads, block_size, d, window_size)."""
        table = table.view(-1, *table.shape[-2:])
        if torch.jit.is_tracing():  # converters of traces know no `unfold`
            rows = [table.narrow(1, first, window_size) for first in reversed(range(self.block_size))]
            return torch.stack(rows, dim=1).transpose(-2, -1)
        return table.unfold(1, window_size, 1).flip(1)

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, block_size={self.block_size}, halo_size={self.halo_size}, '
            f'grid_size={self.grid_size}, num_prefix_tokens={self.num_prefix_tokens}'
        )


def _with_windows(tokens: Tensor, num_prefix_tokens: int, grid: BlockGrid, fill: float = 0.0) -> Tensor:
    """For each block, the prefix tokens and those of its window: (heads, R, n, M, d) from (heads, R, N, d)."""
    windows = grid.windows(tokens[..., num_prefix_tokens:, :], fill)
    prefix = tokens[:, :, None, :num_prefix_tokens].expand(-1, -1, windows.shape[2], -1, -1)
    return torch.cat((prefix, windows), dim=-2) if num_prefix_tokens else windows
