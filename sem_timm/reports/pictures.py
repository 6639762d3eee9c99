"""Pictures of reports, drawn with matplotlib and without its global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sem_timm.errors import MissingPackageError, OptionError

_ENDINGS = ('.png', '.svg', '.pdf')
_GREY = '#666666'

# Narrower scales would show noise as colour.
_LEAST_RANGE = 0.1


@dataclass(frozen=True, eq=False)
class Panel:
    """One heatmap.

    Attributes:
        title: What it shows.
        label: What the colours mean.
        values: (rows, columns), NaN where there is nothing.
        spread: Standard deviations to be written beside them.
        neutral: The value in the middle of the colours, if there is one.
    """

    title: str
    label: str
    values: Tensor
    spread: Tensor | None = None
    neutral: float | None = None

    def limits(self) -> tuple[float, float]:
        """The values at both ends of the colours."""
        known = self.values[~self.values.isnan()]
        low, high = float(known.min()), float(known.max())
        if self.neutral is not None:
            reach = max(high - self.neutral, self.neutral - low, _LEAST_RANGE / 2)
            return self.neutral - reach, self.neutral + reach
        missing = max(_LEAST_RANGE - (high - low), 0.0)
        return max(low - missing / 2, 0.0), max(low - missing / 2, 0.0) + max(high - low, _LEAST_RANGE)


def check_path(path: str | Path) -> Path:
    """The path of a picture that can be written.

    Raises:
        OptionError: If its ending is unknown or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in _ENDINGS:
        raise OptionError(f'path={str(path)!r} does not end like a picture; there are: {", ".join(_ENDINGS)}.')
    if not path.parent.is_dir():
        raise OptionError(f'path={str(path)!r}: there is no folder {str(path.parent)!r}.')
    return path


def heatmaps(path: Path, panels: Sequence[Panel], rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Draws heatmaps next to each other, with the value in each cell and rows from top to bottom."""
    cell = 0.98 if panels[0].spread is not None else 0.7
    names = 0.085 * max(map(len, rows)) + 0.5
    width = names + len(panels) * (max(len(columns) * cell, 1.9) + 0.95)
    figure = _figure(max(width, 0.09 * len(title)), 0.26 * len(rows) + 1.55)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for one, panel in zip(axes, panels):
        _heatmap(figure, one, panel, columns)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8.5)
    axes[0].set_ylabel('block', fontsize=9.5)
    figure.suptitle(title, x=0.01, ha='left', fontsize=10.5, fontweight='bold')
    figure.savefig(path)


def _heatmap(figure: Any, axes: Any, panel: Panel, columns: Sequence[str]) -> None:
    low, high = panel.limits()
    image = axes.imshow(
        panel.values.numpy(), cmap='YlGnBu' if panel.neutral is None else 'RdBu_r', vmin=low, vmax=high, aspect='auto'
    )
    axes.set_title(panel.title, loc='left', fontsize=10)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_xlabel('operator', fontsize=9.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, values in enumerate(panel.values.tolist()):
        for column, value in enumerate(values):
            if math.isnan(value):
                axes.text(column, row, '–', ha='center', va='center', fontsize=8, color=_GREY)
                continue
            text = f'{value:.3f}' if panel.spread is None else f'{value:.2f} ±{float(panel.spread[row, column]):.2f}'
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(column, row, text, ha='center', va='center', fontsize=8, color='white' if dark else 'black')
    bar = figure.colorbar(image, ax=axes, orientation='horizontal', location='bottom', shrink=0.9, aspect=28, pad=0.01)
    bar.set_label(panel.label, fontsize=8.5, color=_GREY)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)


def overlays(path: Path, image: Tensor, maps: Sequence[Tensor], labels: Sequence[str], title: str) -> None:
    """Draws an image (H, W, 3) alone and under each of some maps (h, w), each coloured from 0 to its largest value."""
    count = len(maps) + 1
    columns = min(count, max(4, math.ceil(math.sqrt(count))))
    figure = _figure(max(1.75 * columns, 0.09 * len(title)), 1.98 * math.ceil(count / columns) + 0.75)
    panels = figure.subplots(math.ceil(count / columns), columns, squeeze=False).ravel()
    height, width = image.shape[:2]
    for axes in panels:
        axes.axis('off')
    panels[0].imshow(image.numpy())
    panels[0].set_title('image', fontsize=8.5)
    drawn = None
    for axes, values, label in zip(panels[1:], maps, labels):
        largest = float(values.max())
        shade = values.float().numpy() / (largest or 1.0)
        axes.imshow(image.mean(-1).numpy(), cmap='gray', vmin=0, vmax=1)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        drawn = axes.imshow(shade, cmap='inferno', vmin=0, vmax=1, alpha=0.62, extent=extent, interpolation='nearest')
        axes.set_title(f'{label}\nlargest {largest:.3f}', fontsize=8)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(panels), orientation='horizontal', shrink=0.5, aspect=40, pad=0.02)
        bar.set_label('share of the slot in what a token reads, relative to its largest', fontsize=8.5, color=_GREY)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
    figure.suptitle(title, x=0.01, ha='left', fontsize=10.5, fontweight='bold')
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    """A figure of so many inches.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("pictures are drawn with matplotlib: pip install 'sem_timm[tools]'") from error
    return Figure(figsize=(width, height), dpi=150, layout='constrained')


def draw_front(path: Path, points: Sequence[tuple[float, float, int]], labels: tuple[str, str], title: str) -> None:
    """Draws a line through points (x, y, number to be written beside it)."""
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker='o', color='#1f5f8b')
    for x, y, number in points:
        axes.annotate(str(number), (x, y), (4, 5), textcoords='offset points', fontsize=8, color=_GREY)
    axes.set_xlabel(labels[0], fontsize=9.5)
    axes.set_ylabel(labels[1], fontsize=9.5)
    axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title, x=0.01, ha='left', fontsize=10.5, fontweight='bold')
    figure.savefig(path)
