"""docs/transfer.png: what each swap keeps of the original's accuracy, as it is and after the closed form."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

Row = dict[str, Any]

STAGES = {'the swap': '#b0b0b0', 'initialize': '#0072b2'}


def draw(sets: dict[str, list[Row]], path: Path) -> None:
    """One panel for each set of images: a row for each attention, a point for each seed and a mark for their mean.

    Args:
        sets: Rows that the page shows, by title, with the original among them.
        path: The picture.
    """
    names = sorted(
        {row['swap'] for rows in sets.values() for row in rows if row['swap'] != 'original'},
        key=lambda name: max(_mean(rows, name) for rows in sets.values()),
    )
    figure, panels = plt.subplots(1, len(sets), figsize=(4.6 * len(sets) + 2, 0.42 * len(names) + 1.4), sharey=True)
    for panel, (title, rows) in zip(panels, sets.items()):
        original = next(row['accuracy'] for row in rows if row['swap'] == 'original')
        panel.axvline(original, color='0.4', linestyle='--', linewidth=1)
        for stage, colour in STAGES.items():
            for height, name in enumerate(names):
                values = [row['accuracy'] for row in rows if row['swap'] == name and _stage(row) == stage]
                panel.scatter(values, [height] * len(values), s=18, color=colour, alpha=0.5, linewidth=0)
                if values:
                    panel.scatter(mean(values), height, s=60, marker='D', color=colour, label=stage)
        panel.set_title(f'{title}; dashed: the original, {original:.1f} %', fontsize=10, loc='left')
        panel.set_xlabel('accuracy, %')
        panel.set_xlim(0, 100)
        panel.grid(axis='x', alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    handles, labels = panels[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles))
    figure.tight_layout()
    figure.legend(shown.values(), shown.keys(), loc='lower left', fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _stage(row: Row) -> str:
    return 'initialize' if row['stages'] else 'the swap'


def _mean(rows: list[Row], name: str) -> float:
    values = [row['accuracy'] for row in rows if row['swap'] == name]
    return mean(values) if values else 0.0
