"""Where the tokens of an attention lie in the image: prefix tokens taken off, the others as a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor, nn

from sem_timm.errors import RefusedError
from sem_timm.meta import layout_of


@dataclass(frozen=True)
class TokenGrid:
    """Leading tokens that are not image, then a grid of height × width tokens, row by row."""

    prefix: int
    height: int
    width: int


def token_grid(num_tokens: int, inputs: list[Any], image_size: tuple[int, int]) -> TokenGrid | None:
    """The grid of so many tokens, or None if they form none.

    Args:
        num_tokens: Number of tokens, prefix included.
        inputs: Arguments of the attention module, in a pass that followed layouts.
        image_size: Height and width of the image; where nothing else tells, the grid has its proportions.
    """
    data = [value for value in inputs if isinstance(value, Tensor) and layout_of(value) is not None]
    prefixes = {layout.prefix for value in data if (layout := layout_of(value)) is not None and value.ndim == 3}
    for prefix in sorted(prefixes or {0}, reverse=True):
        for height, width in (*_stated_sizes(inputs, data), _in_proportion(num_tokens - prefix, image_size)):
            if height > 0 and height * width == num_tokens - prefix:
                return TokenGrid(prefix, height, width)
    return None


def _stated_sizes(inputs: list[Any], data: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Heights and widths that the arguments tell: as the shape of a feature map, or as a pair of numbers."""
    for value in data:
        layout = layout_of(value)
        if value.ndim == 4 and layout is not None:
            yield tuple(value.shape[2:]) if layout.channel == 1 else tuple(value.shape[1:3])  # type: ignore[misc]
    for value in inputs:
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(size, int) for size in value):
            yield value[0], value[1]


def fits_image(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether a grid (H, W) has the proportions of an image; windows × tokens, which look like one, mostly have not."""
    height, width = grid[0] * image_size[1], grid[1] * image_size[0]
    # Rounding up or down changes a side of one patch or more by less than twice.
    return max(height, width) < 4 * min(height, width)


def _in_proportion(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a grid of square patches; zeros where the number does not fit."""
    if num_tokens < 1:
        return 0, 0
    stride = sqrt(image_size[0] * image_size[1] / num_tokens)
    height, width = (round(size / stride) for size in image_size)
    return (height, width) if height * width == num_tokens else (0, 0)


def check_not_windowed(name: str, samples: int, parts: int, num_tokens: int, total: int) -> None:
    """Refuses attention in which a slot does not see the image as a whole.

    Args:
        name: The layer.
        samples: Size of the batch that the attention module was given for one image.
        parts: Sets of tokens that a head attends in, over that whole batch.
        num_tokens: Tokens in each.
        total: Tokens that the attention module was given.

    Raises:
        RefusedError: If there are several sets.
    """
    if samples == 1 and (parts == 1 or num_tokens == total):
        return
    raise RefusedError(
        f'{name} attends in {max(samples, parts)} windows of {num_tokens} tokens each, and its slots look at each '
        'window by itself: there is no map of the whole image.\n'
        '  Choose a layer whose attention is global, or an image so small that one window covers it.'
    )


def tokens_given(inputs: list[Any]) -> tuple[int, int]:
    """Batch size and number of tokens of the first input that is data."""
    for value in inputs:
        layout = layout_of(value)
        if isinstance(value, Tensor) and layout is not None and value.ndim >= 3:
            channel = layout.channel if layout.channel is not None else value.ndim - 1
            return value.shape[0], value[0].numel() // value.shape[channel]
    return 1, 0


def check_fits(name: str, grid: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Refuses a grid (H, W) that has not the proportions of the image.

    Raises:
        RefusedError: If it has not.
    """
    if not fits_image(grid, image_size):
        shape, size = (' × '.join(map(str, pair)) for pair in (grid, image_size))
        raise RefusedError(
            f'the tokens of {name} lie as {shape}, such as windows × tokens, which is no grid over {size} pixels.'
        )


def check_order(model: nn.Module, name: str) -> None:
    """Refuses the blocks of timm's Hiera that have tokens in another order than the image: all but the last stage's.

    Raises:
        RefusedError: If the layer is in one of them.
    """
    schedule = getattr(getattr(model, 'reroll', None), 'schedule', None) or {}
    unordered = [f'blocks.{number}.' for number, (steps, _) in schedule.items() if steps]
    if name.startswith(tuple(unordered)):
        raise RefusedError(
            f'the tokens of {name} lie in no rows of the image: {type(model).__name__} orders them by mask units up '
            f'to its last stage. Choose a layer from blocks.{len(unordered)} on.'
        )
