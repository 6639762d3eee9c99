"""Draws the accuracies of all trainings on Fashion-MNIST: each run as a dot, each mean as a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fashion.reading import Line
from fashion.results import Section

COLORS = {'crop-flip': '#2667b5', 'none': '#d98314'}
_OFFSETS = {1: (0.0,), 2: (-0.17, 0.17)}  # of the augmentations from the middle of a row


def draw(found: list[Section], path: Path) -> None:
    """Writes a PNG with one panel per setting, but for those with a single seed, of which no picture tells anything."""
    found = [s for s in found if any(line.spread is not None for lines in s.tables.values() for line in lines)] or found
    rows = [len({line.name for lines in section.tables.values() for line in lines}) for section in found]
    heights = [0.42 * count + 1.35 for count in rows]
    picture = Figure(figsize=(8.6, sum(heights)), dpi=150, layout='constrained')
    FigureCanvasAgg(picture)
    panels = picture.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, section in zip(panels, found):
        _panel(axes, section)
    picture.savefig(path)


def _panel(axes: Axes, section: Section) -> None:
    """Variants from top to bottom, and behind them the original's mean ± standard deviation."""
    titles = list(dict.fromkeys(line.title for lines in section.tables.values() for line in lines))
    offsets = _OFFSETS[len(section.tables)]
    for offset, (augmentation, lines) in zip(offsets, section.tables.items()):
        color = COLORS[augmentation]
        base = next((line for line in lines if line.name == section.setting.original.name), None)
        if base is not None and base.spread is not None:
            axes.axvspan(base.mean - base.spread, base.mean + base.spread, color=color, alpha=0.11, linewidth=0)
        for line in lines:
            _row(axes, line, titles.index(line.title) + offset, color)
        axes.plot([], [], 'o', color=color, label=f'augmentation: {augmentation}')
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_title(
        f'{section.network}: {section.setting.train_images:,} images, {section.setting.epochs} epochs',
        loc='left',
        fontsize=11,
        fontweight='bold',
    )
    axes.set_xlabel('test accuracy after the last epoch, %; bar: mean, band: the original ± standard deviation')
    axes.grid(axis='x', color='#e4e4e4', linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[['top', 'right', 'left', 'bottom']].set_visible(False)
    axes.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _row(axes: Axes, line: Line, height: float, color: str) -> None:
    values = list(line.accuracies.values())
    axes.plot(values, [height] * len(values), 'o', color=color, markersize=5, alpha=0.6, markeredgewidth=0)
    axes.plot([line.mean] * 2, [height - 0.15, height + 0.15], color=color, linewidth=2.4, solid_capstyle='butt')
