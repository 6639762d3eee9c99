"""The result of a comparison as a picture."""

from __future__ import annotations

from pathlib import Path

from sem_timm.comparison.result import ComparisonResult

_WIDTH, _ROW_HEIGHT, _MARGIN = 9.0, 0.38, 1.3  # inches
_OWN, _OTHER, _PALE = '#0072b2', '#444444', '#999999'


def draw(result: ComparisonResult, file: Path) -> None:
    """Draws accuracies of all seeds beside the differences to the baseline with their intervals.

    Args:
        result: The result.
        file: Where to, a PNG.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.refused is None]
    figure = Figure(figsize=(_WIDTH, _MARGIN + _ROW_HEIGHT * max(len(rows), 2)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        values = [100 * value for value in row.accuracies.values()]
        left.plot(values, [place] * len(values), 'o', color=_PALE, markersize=4, alpha=0.7)
        if row.mean is not None:
            left.plot([100 * row.mean], [place], 'D', color=_OWN, markersize=6)
        found = row.difference
        if found is None or found.mean is None:
            continue
        color = _OWN if found.is_told else _OTHER
        if found.low is not None and found.high is not None:
            right.plot([100 * found.low, 100 * found.high], [place, place], '-', color=color, linewidth=2)
        right.plot([100 * found.mean], [place], 'D', color=color, markersize=6)
    right.axvline(0, color=_PALE, linewidth=1)
    left.set_yticks(range(len(rows)), [_labelled(row.name) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel('accuracy, %: seeds and their mean')
    right.set_xlabel(f'points above {_labelled(result.baseline)}: mean, 95 % interval')
    for axes in (left, right):
        axes.grid(axis='x', alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(file, dpi=150, format='png')


def _labelled(name: str) -> str:
    """A name that matplotlib takes for text and not for formulas, and that leaves room for the picture."""
    return (name if len(name) <= 40 else f'{name[:39]}…').replace('$', r'\$')
