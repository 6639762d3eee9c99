"""A grid of tokens cut into square blocks, and the larger windows around them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


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
        rows = -(-self.height // self.block_size)
        x = blocks.unflatten(-2, (self.block_size, self.block_size))
        x = x.unflatten(-4, (rows, -(-self.width // self.block_size))).transpose(-4, -3)
        x = x.flatten(-5, -4).flatten(-3, -2)
        return x[..., : self.height, : self.width, :].flatten(-3, -2)

    def _cut(self, tokens: Tensor, size: int, margin: int, fill: float) -> Tensor:
        """Squares of a size, one for each block, out of the grid with a margin around it."""
        bottom, right = (margin + -side % self.block_size for side in (self.height, self.width))
        x = tokens.unflatten(-2, (self.height, self.width))
        x = F.pad(x, (0, 0, margin, right, margin, bottom), value=fill)
        squares = x.unfold(-3, size, self.block_size).unfold(-3, size, self.block_size)  # (..., rows, columns, d, y, x)
        return squares.movedim(-3, -1).flatten(-3, -2).flatten(-4, -3)
