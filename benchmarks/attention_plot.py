"""Draws what `attention.py` measured: time and memory of one layer against the number of tokens.

    python benchmarks/attention.py --out build/figures.json
    python benchmarks/attention_plot.py build/figures.json docs/attention_cost.png

Both axes are logarithmic. Broken lines are attentions whose time is quadratic in tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

# Colour and width of the attentions that matter most first; the original is drawn on top.
STYLES: dict[str, dict[str, Any]] = {
    'original': {'color': '#1b1b1b', 'linewidth': 2.6, 'linestyle': (0, (4, 1.4)), 'zorder': 5},
    'external': {'color': '#d1203f', 'linewidth': 2.8, 'zorder': 6},
    'efficient': {'color': '#1f8a70', 'linewidth': 1.7},
    'linear': {'color': '#2667b5', 'linewidth': 1.7},
    'halo': {'color': '#7d4fa8', 'linewidth': 1.7},
    'monarch': {'color': '#5b6b1f', 'linewidth': 1.7},
    'eamlp': {'color': '#d98314', 'linewidth': 1.7},
    'catt': {'color': '#7f7f7f', 'linewidth': 1.7, 'linestyle': (0, (4, 1.4))},
    'caam': {'color': '#a0623a', 'linewidth': 1.7, 'linestyle': (0, (4, 1.4))},
}
PANELS = {'milliseconds': 'Time, ms', 'peak_mib': 'Peak memory, MiB'}
LABEL_HEIGHT = 0.055  # of the panel, at the size of the text


def spread(heights: list[float], gap: float) -> list[float]:
    """Moves labels apart, as little as needed, so that neighbours are at least a gap from each other.

    Those that are too close form a stack around the mean of where its labels belong.
    """
    stacks: list[list[float]] = []
    for height in sorted(heights):
        stacks.append([height])
        while len(stacks) > 1 and _bottom(stacks[-1], gap) < _bottom(stacks[-2], gap) + len(stacks[-2]) * gap:
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    placed = [_bottom(stack, gap) + place * gap for stack in stacks for place in range(len(stack))]
    order = sorted(range(len(heights)), key=heights.__getitem__)
    return [placed[order.index(number)] for number in range(len(heights))]


def _bottom(stack: list[float], gap: float) -> float:
    return sum(stack) / len(stack) - (len(stack) - 1) * gap / 2


def plain(value: float) -> str:
    """A number without an exponent."""
    return f'{value:,.0f}' if value >= 1 else f'{value:g}'


def draw(axes: Axes, tokens: list[int], curves: dict[str, list[float]], title: str) -> None:
    """One panel, with the name of each curve at its end."""
    for name, values in curves.items():
        style = {'color': '#444444', 'linewidth': 1.7, **STYLES.get(name, {})}
        axes.plot(tokens, values, marker='o', markersize=style['linewidth'] + 1.6, markeredgewidth=0, **style)
    axes.set_xscale('log')
    axes.set_yscale('log')
    low, high = (choose(value for values in curves.values() for value in values) for choose in (min, max))
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.set_xlim(tokens[0] / 1.15, tokens[-1] * 1.15)
    labelled = [tokens[-1]]
    for count in reversed(tokens):
        if labelled[-1] / count > 1.9:  # closer labels would touch
            labelled.append(count)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold', pad=10)
    axes.set_xlabel('tokens', fontsize=11)
    axes.tick_params(labelsize=10.5, length=0, which='both')
    axes.grid(which='major', color='#e4e4e4', linewidth=0.9)
    axes.spines[['top', 'right', 'left', 'bottom']].set_visible(False)
    ends = {name: math.log(values[-1] * 1.5 / low) / math.log(high * 1.5**2 / low) for name, values in curves.items()}
    for (name, end), height in zip(ends.items(), spread(list(ends.values()), LABEL_HEIGHT)):
        style = STYLES.get(name, {'color': '#444444'})
        weight = 'bold' if name in ('original', 'external') else 'normal'
        axes.annotate(
            name,
            (tokens[-1], curves[name][-1]),
            (1.045, height),
            textcoords='axes fraction',
            color=style['color'],
            fontsize=11,
            fontweight=weight,
            va='center',
            arrowprops=None if abs(end - height) < 0.008 else _leader(style['color']),
        )


def _leader(color: str) -> dict[str, Any]:
    return {'arrowstyle': '-', 'color': color, 'linewidth': 0.7, 'shrinkA': 1, 'shrinkB': 4, 'relpos': (0, 0.5)}


def figure(part: dict[str, Any], device: str) -> Figure:
    """Both panels, and a line about what was measured and on what."""
    setting, machine = part['setting'], part['machine']
    picture, panels = plt.subplots(1, 2, figsize=(10, 4.9), dpi=180)
    for axes, (name, title) in zip(panels, PANELS.items()):
        draw(axes, part['tokens'], part[name], title)
    threads = f'{machine["threads"]} thread{"s" * (machine["threads"] != 1)} of ' if device == 'cpu' else ''
    picture.text(
        0.012,
        0.02,
        f'One layer in inference, {setting["channels"]} channels, {setting["heads"]} heads, batch {setting["batch"]}, '
        f'{setting["dtype"].removeprefix("torch.")}, {"compiled" if setting["compiled"] else "eager"}; '
        f'{threads}{machine["processor"]}, torch {machine["torch"]}, {part["date"]}.\n'
        'Broken lines: time quadratic in tokens. The original is timm.layers.Attention with '
        'scaled_dot_product_attention, which holds no table of pairs.',
        fontsize=8.5,
        color='#666666',
        linespacing=1.5,
    )
    picture.subplots_adjust(left=0.062, right=0.898, top=0.915, bottom=0.225, wspace=0.46)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figures', type=Path, help='file of figures that attention.py wrote')
    parser.add_argument('picture', type=Path, help='PNG to write')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    results = json.loads(args.figures.read_text())
    if 'layer' not in results.get(args.device, {}):
        parser.error(f'{args.figures} has nothing measured on {args.device}; run attention.py --device {args.device}.')
    figure(results[args.device]['layer'], args.device).savefig(args.picture)


if __name__ == '__main__':
    main()
