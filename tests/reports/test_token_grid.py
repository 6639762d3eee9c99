"""Grids of tokens by what is told and by the proportions of the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sem_timm.meta.layout import Layout, set_layout
from sem_timm.reports.token_grid import TokenGrid, fits_image, token_grid


def tokens(count: int, prefix: int) -> Any:
    return set_layout(torch.zeros(1, count, 8), Layout(2, prefix))


@pytest.mark.parametrize(
    ('count', 'inputs', 'size', 'expected'),
    [
        (197, [tokens(197, 1)], (224, 224), TokenGrid(1, 14, 14)),
        (24, [], (64, 96), TokenGrid(0, 4, 6)),
        (29, [tokens(29, 5)], (64, 96), TokenGrid(5, 4, 6)),
        (24, [tokens(24, 0), (3, 8)], (64, 96), TokenGrid(0, 3, 8)),
        (25, [tokens(97, 1), [6, 4]], (64, 96), TokenGrid(1, 6, 4)),
        (24, [set_layout(torch.zeros(1, 8, 2, 12), Layout(1))], (64, 96), TokenGrid(0, 2, 12)),
        (24, [set_layout(torch.zeros(1, 12, 2, 8), Layout(3))], (64, 96), TokenGrid(0, 12, 2)),
        (23, [], (64, 96), None),
        (1, [tokens(1, 1)], (64, 96), None),
    ],
)
def test_grid_is_found_or_is_none(
    count: int, inputs: list[Any], size: tuple[int, int], expected: TokenGrid | None
) -> None:
    assert token_grid(count, inputs, size) == expected


@pytest.mark.parametrize(
    ('grid', 'size', 'expected'),
    [((4, 6), (64, 96), True), ((2, 32), (33, 1024), True), ((4, 16), (256, 256), False), ((1, 49), (112, 112), False)],
)
def test_windows_by_tokens_have_not_the_proportions_of_the_image(
    grid: tuple[int, int], size: tuple[int, int], expected: bool
) -> None:
    assert fits_image(grid, size) is expected
