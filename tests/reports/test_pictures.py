"""Axes, labels and colours of the pictures; what they look like was looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sem_timm.errors import MissingPackageError, OptionError
from sem_timm.reports import pictures
from sem_timm.reports.pictures import Panel, check_path, heatmaps, overlays

BLOCKS = [f'stages.{i // 9}.blocks.{i % 9}' for i in range(50)]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from now on."""
    figures: list[Any] = []
    original = pictures._figure

    def keep(*size: float) -> Any:
        figures.append(original(*size))
        return figures[-1]

    monkeypatch.setattr(pictures, '_figure', keep)
    return figures


def test_heatmap_has_blocks_by_operators_and_each_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    values = torch.rand(50, 3, dtype=torch.float64)
    values[7, 1] = float('nan')
    heatmaps(tmp_path / 'map.png', [Panel('Decision', 'weight', values, values / 10)], BLOCKS, ['se', 'eca', 'ie'], 't')
    axes, bar = figures[0].axes
    assert axes.get_ylabel() == 'block' and axes.get_xlabel() == 'operator' and bar.get_xlabel() == 'weight'
    assert [label.get_text() for label in axes.get_yticklabels()] == BLOCKS
    assert [label.get_text() for label in axes.get_xticklabels()] == ['se', 'eca', 'ie']
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 150 and texts[22] == '–' and texts[0] == f'{values[0, 0]:.2f} ±{values[0, 0] / 10:.2f}'
    top, bottom = (axes.transData.transform((0, row))[1] for row in (0, 49))
    assert top > bottom  # the first block is at the top
    # Rows are at least as far apart as the text is high, in pixels.
    assert (top - bottom) / 49 > max(text.get_window_extent().height for text in axes.texts)


def test_colours_are_centred_and_not_stretched_over_noise() -> None:
    noise = torch.tensor([[0.5, 0.501]])
    low, high = Panel('', '', noise).limits()
    assert high - low == pytest.approx(0.1) and low < 0.5 < high
    low, high = Panel('', '', torch.tensor([[0.9, 1.3, float('nan')]]), neutral=1.0).limits()
    assert (low, high) == pytest.approx((0.7, 1.3))
    low, _ = Panel('', '', torch.tensor([[0.0, 0.01]])).limits()
    assert low == 0.0


def test_overlay_lays_maps_over_the_whole_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    image = torch.rand(20, 40, 3)
    overlays(tmp_path / 'map.png', image, [torch.rand(2, 4), torch.zeros(2, 4)], ['slot 3', 'slot 5'], 'title')
    axes = figures[0].axes
    assert axes[0].get_title() == 'image' and axes[1].get_title().startswith('slot 3')
    under, over = axes[1].get_images()
    assert tuple(under.get_extent()) == tuple(over.get_extent()) == (-0.5, 39.5, 19.5, -0.5)
    with Image.open(tmp_path / 'map.png') as picture:
        assert picture.size[0] > 100


@pytest.mark.parametrize('name', ['map', 'map.jpg', 'missing/map.png'])
def test_path_that_cannot_be_drawn_to_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r'path='):
        check_path(tmp_path / name)


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(MissingPackageError, match=r"pip install 'sem_timm\[tools\]'"):
        overlays(tmp_path / 'map.png', torch.rand(4, 4, 3), [], [], '')
