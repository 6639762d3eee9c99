"""Grids of tokens behind prefix tokens, and the blocks and windows that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm.errors import OptionError
from sem_timm.layers.arguments import check_at_least_one, check_not_negative
from sem_timm.layers.attention_core import with_axis_moved


def check_token_grid(grid_size: Sequence[int] | None, num_prefix_tokens: int) -> tuple[int, int] | None:
    """The options that tell a core how its tokens lie, checked; returns ``grid_size`` as a tuple.

    Raises:
        OptionError: If one is out of range.
    """
    check_not_negative('num_prefix_tokens', num_prefix_tokens)
    if grid_size is None:
        return None
    if not isinstance(grid_size, Sequence) or len(grid_size) != 2:
        raise OptionError(f'grid_size={grid_size!r}: write height and width, such as grid_size=(14, 14).')
    for side in grid_size:
        check_at_least_one('grid_size', side)
    return grid_size[0], grid_size[1]


def grid_of(num_tokens: int, grid_size: tuple[int, int] | None, num_prefix_tokens: int) -> tuple[int, int] | None:
    """Height and width of the grid that so many tokens form, prefix tokens included: the given one, or a square."""
    area = num_tokens - num_prefix_tokens
    if grid_size is not None and area == grid_size[0] * grid_size[1]:
        return grid_size
    side = math.isqrt(max(area, 0))
    return (side, side) if area > 0 and side * side == area else None


def required_grid(
    num_tokens: int, grid_size: tuple[int, int] | None, num_prefix_tokens: int, asked_by: str
) -> tuple[int, int]:
    """As `grid_of`, where there has to be one.

    Raises:
        OptionError: If the tokens form none; ``asked_by`` says what needs it.
    """
    grid = grid_of(num_tokens, grid_size, num_prefix_tokens)
    if grid is None:
        raise OptionError(
            f'{asked_by} got {num_tokens} tokens; without {num_prefix_tokens} prefix tokens that is no square grid and '
            f'not grid_size={grid_size}.\n'
            '  Say what they are: grid_size=(height, width), num_prefix_tokens=1 for a class token.'
        )
    return grid


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


@dataclass(frozen=True)
class Tiles:
    """How tokens of a grid are laid out in tiles; a grid that is no multiple of them is filled up.

    Args:
        height: Height of the grid in tokens.
        width: Width of the grid in tokens.
        tile_height: Height of a tile.
        tile_width: Width of a tile.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int

    @property
    def area(self) -> int:
        """Number of tokens in a tile."""
        return self.tile_height * self.tile_width

    @property
    def divide_grid(self) -> bool:
        """Whether the grid is a multiple of the tiles."""
        return self.height % self.tile_height == 0 and self.width % self.tile_width == 0

    def cut(self, *tokens: Tensor, fill: float = 0.0) -> Tensor:
        """Tokens (..., h w, d) as tiles (M, R, area, d), R the product of the leading axes; several side by side."""
        parts = [self._in_order(each, fill) for each in tokens]
        tiles = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0].contiguous()
        rows, columns = self._counts
        leading = math.prod(tiles.shape[2:-3])
        return tiles.view(rows * columns, leading, self.area, tiles.shape[-1])

    def join(self, places: Tensor, leading: Sequence[int]) -> Tensor:
        """Tokens (..., h w, d) with leading axes from what each place in a tile has of all tiles, (R area, M, d)."""
        rows, columns = self._counts
        x = places.view(math.prod(leading), self.tile_height, self.tile_width, rows, columns, places.shape[-1])
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
        return x[:, : self.height, : self.width].reshape(*leading, self.height * self.width, places.shape[-1])

    def _in_order(self, tokens: Tensor, fill: float) -> Tensor:
        """Tokens (..., h w, d) as (rows, columns, ..., tile_height, tile_width, d)."""
        rows, columns = self._counts
        x = tokens.view(*tokens.shape[:-2], self.height, self.width, tokens.shape[-1])
        if not self.divide_grid:
            bottom, right = rows * self.tile_height - self.height, columns * self.tile_width - self.width
            x = F.pad(x, (0, 0, 0, right, 0, bottom), value=fill)
        x = x.view(*x.shape[:-3], rows, self.tile_height, columns, self.tile_width, x.shape[-1])
        return with_axis_moved(with_axis_moved(x, -5, 0), -3, 1)

    @property
    def _counts(self) -> tuple[int, int]:
        """How many tiles there are from top to bottom and from left to right."""
        return -(-self.height // self.tile_height), -(-self.width // self.tile_width)
