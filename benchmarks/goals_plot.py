"""Draws a result file of `everything.py`: every figure that has a goal, beside it.

python benchmarks/goals_plot.py docs/benchmarks/DATE.json picture.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt

REACHED, MISSED = '#1f8a70', '#d1203f'


def draw(results: dict[str, Any], picture: Path) -> None:
    """One row for each goal: how much of it the figure takes up."""
    lines = {
        name if device == 'cpu' else f'{name} ({device})': line
        for device, parts in results.items()
        for figures in parts.values()
        for name, line in figures['lines'].items()
        if line['goal'] is not None
    }
    figure, axes = plt.subplots(figsize=(10, 0.9 + 0.27 * max(len(lines), 3)), dpi=160)
    for row, line in enumerate(lines.values()):
        share = line['value'] / line['goal']
        color = REACHED if share <= 1 else MISSED
        axes.plot([0, share], [row, row], color=color, linewidth=5, solid_capstyle='butt')
        text = f'{line["value"]:.3g}, goal {line["goal"]:.4g}'
        axes.annotate(
            text, (max(share, 1), row), (6, 0), textcoords='offset points', va='center', fontsize=8.5, color=color
        )
    axes.axvline(1, color='#1b1b1b', linewidth=1.1)
    axes.set_yticks(range(len(lines)), list(lines), fontsize=9)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * max([1.0, *(line['value'] / line['goal'] for line in lines.values())]))
    axes.set_xlabel('measured / goal: left of the line is reached', fontsize=9.5)
    axes.tick_params(length=0)
    axes.grid(axis='x', color='#e4e4e4', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left', 'bottom']].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figures', type=Path, help='result file')
    parser.add_argument('picture', type=Path, help='PNG to write')
    args = parser.parse_args()
    draw(json.loads(args.figures.read_text()), args.picture)


if __name__ == '__main__':
    main()
