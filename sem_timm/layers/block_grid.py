"""A grid of tokens cut into square blocks, and the larger windows around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm.layers.attention_core import with_axis_moved


@dataclass(frozen=True)
class BlockGrid:
    """How tokens of a grid are laid out in blocks; a grid that is no multiple of the block size is filled up.

    Args:
        height: Height of the grid in tokens.
        width: Width of the grid in tokens.
        block_size: Side of a block.
        halo_size: How far a window reaches beyond its block on every side.
    """

    height: int
    width: int
    block_size: int
    halo_size: int

    @property
    def window_size(self) -> int:
        """Side of a window."""
        return self.block_size + 2 * self.halo_size

    def blocks(self, tokens: Tensor) -> Tensor:
        """Tokens (..., h w, d) as blocks (..., n, block_size^2, d), with zeros where the grid is filled up."""
        return self._cut(tokens, self.block_size, 0, 0.0)

    def windows(self, tokens: Tensor, fill: float = 0.0) -> Tensor:
        """Tokens (..., h w, d) as windows (..., n, window_size^2, d), with a number where there is no token."""
        return self._cut(tokens, self.window_size, self.halo_size, fill)

    def tokens(self, blocks: Tensor) -> Tensor:
        """Blocks (..., n, block_size^2, d) as tokens (..., h w, d), the inverse of `blocks`."""
        x = blocks.view(*blocks.shape[:-3], *self._counts, self.block_size, self.block_size, blocks.shape[-1])
        x = x.transpose(-4, -3)
        x = x.flatten(-5, -4).flatten(-3, -2)
        return x[..., : self.height, : self.width, :].flatten(-3, -2)

    def _cut(self, tokens: Tensor, size: int, margin: int, fill: float) -> Tensor:
        """Squares of a size, one for each block, out of the grid with a margin around it."""
        bottom, right = (margin + -side % self.block_size for side in (self.height, self.width))
        x = tokens.view(*tokens.shape[:-2], self.height, self.width, tokens.shape[-1])
        x = F.pad(x, (0, 0, margin, right, margin, bottom), value=fill)
        first = x.dim() - 3
        if torch.jit.is_tracing():
            # The older exporter to ONNX cannot unfold what was padded, whose size it does not know.
            for axis, count in zip((first, first + 2), self._counts):
                parts = [x.narrow(axis, index * self.block_size, size) for index in range(count)]
                x = torch.stack(parts, dim=first if axis == first else first + 1)
            return x.flatten(-3, -2).flatten(-4, -3)
        x = x.unfold(first, size, self.block_size).unfold(first + 1, size, self.block_size)
        squares = with_axis_moved(x, -3, -1)  # (..., rows, columns, y, x, d)
        return squares.flatten(-3, -2).flatten(-4, -3)

    @property
    def _counts(self) -> tuple[int, int]:
        """How many blocks there are from top to bottom and from left to right."""
        return -(-self.height // self.block_size), -(-self.width // self.block_size)
