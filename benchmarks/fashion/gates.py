"""What the gates of trained networks do: SEM's decisions, its operators' factors, and what got no gradient."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from common.piped import piped
from common.run_log import Record

_COLUMNS = {'mean': 'decision', 'gate_mean': 'factor', 'gate_contrast': 'spread over channels'}


def gates(titles: Mapping[str, str], runs: Iterable[Record]) -> list[str]:
    """Paragraphs of a page, none if the log has no figures of gates.

    Args:
        titles: Titles of variants, by name, in the order of the page.
        runs: The trainings, all with one setting and one augmentation.
    """
    found: dict[str, list[Record]] = {name: [] for name in titles}
    for run in runs:
        found[run['variant']].append(run)
    rows = [
        [titles[name], operator.upper(), *(_over_seeds(own, column, operator) for column in _COLUMNS)]
        for name, every in found.items()
        if (own := [run for run in every if 'mean' in run])
        for operator in own[0]['mean']
    ]
    parts = []
    if rows:
        table = piped(['variant', 'operator', *_COLUMNS.values()], rows)
        parts.append('\n'.join([*_EXPLAINED, '', *table]) + '\n')
    parts += _over_training(titles, found)
    dead = {titles[name]: _dead(own) for name, own in found.items() if any(map(_names, own))}
    if dead:
        parts.append('\n'.join([_DEAD, '', *(f'- *{title}*: {text}.' for title, text in dead.items())]) + '\n')
    return parts


_EXPLAINED = (
    'What SEM does after the last epoch, on the first 500 test images, as means over blocks and seeds. Decision: the',
    "operator's weight. Factor: what channels are multiplied by, 1 in an identity and about 0.5 at first as published.",
    'Spread: standard deviation of the factor over channels.',
)
_DEAD = 'New parameters whose gradient was exactly zero in the last step:'


def _over_training(titles: Mapping[str, str], found: Mapping[str, list[Record]]) -> list[str]:
    """A table of the decisions after epochs, eight of them at most."""
    told = {name: [run['decided'] for run in runs if 'decided' in run] for name, runs in found.items()}
    told = {name: runs for name, runs in told.items() if runs}
    if not told:
        return []
    num_epochs = min(len(epochs) for runs in told.values() for epochs in runs)
    shown = [number for number in range(num_epochs) if (num_epochs - 1 - number) % math.ceil(num_epochs / 8) == 0]
    rows = [
        [
            titles[name],
            operator.upper(),
            *(f'{statistics.mean(epochs[number][operator] for epochs in runs):.2f}' for number in shown),
        ]
        for name, runs in told.items()
        for operator in runs[0][0]
    ]
    header = ['variant', 'operator', *(f'epoch {number + 1}' for number in shown)]
    return ['\n'.join(['Decisions during the training, on 500 of its images:', '', *piped(header, rows)]) + '\n']


def _over_seeds(runs: list[Record], column: str, operator: str) -> str:
    return f'{statistics.mean(run[column][operator] for run in runs):.3f}'


def _names(run: Record) -> list[str]:
    names: list[str] = run.get('without_gradient', [])
    return names


def _dead(runs: list[Record]) -> str:
    """How many, and the first few, by seed."""
    told = [
        f'{len(names)} in seed {run["seed"]} (`{"`, `".join(names[:4])}`{" …" * (len(names) > 4)})'
        for run in runs
        if (names := _names(run))
    ]
    return '; '.join(told)
