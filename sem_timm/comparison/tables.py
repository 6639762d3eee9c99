"""The result of a comparison as plain text, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from sem_timm.comparison.conclusions import points
from sem_timm.comparison.result import ComparisonResult, RowResult
from sem_timm.tables import table

_NOTHING = '–'


def as_text(result: ComparisonResult) -> str:
    """The table as it is printed."""
    header, rows = _cells(result)
    return '\n'.join([heading(result), '', *table(header, rows)])


def heading(result: ComparisonResult) -> str:
    """What was compared, in a line or two."""
    told = result.told
    train, validation = result.num_images
    number = max((len(row.accuracies) + len(row.diverged) for row in result.rows), default=0)
    lines = [
        f'{told["model"]} on {told["data"]}: {train:,} images for training, {validation:,} for validation, '
        f'{told["num_classes"]} classes; {told["epochs"]} epochs, {number} seed{"s" * (number != 1)}.'
    ]
    if result.search is None:
        lines.append(f'Learning rate {told["lr"]:g} for all.')
    else:
        tries = f'{len(result.search.lrs)} learning rates x {len(result.search.seeds)} seeds'
        lines.append(
            f'Learning rate of each row: the best of {tries}, on {result.search.fraction:.0%} of the training images '
            'held out.'
        )
    return ' '.join(lines)


def as_markdown(result: ComparisonResult) -> str:
    """A page with the table and what can be told."""
    header, rows = _cells(result)
    lines = [f'# Comparison of {len(result.rows)} rows', '', heading(result), '']
    lines += [_markdown_row(header), '|' + '|'.join(['---', *['---:'] * (len(header) - 1)]) + '|']
    lines += [_markdown_row(row) for row in rows]
    lines += ['', _legend(result, header), '', *(f'- {_escaped(sentence)}' for sentence in result.conclusions)]
    command = result.told.get('command')
    if command:
        lines += ['', f'Made by `{command}`.']
    return '\n'.join(lines) + '\n'


def _markdown_row(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(_escaped(cell) for cell in cells) + ' |'


def _escaped(text: str) -> str:
    return text.replace('\\', '\\\\').replace('|', '\\|').replace('*', '\\*').replace('_', '\\_')


def _legend(result: ComparisonResult, header: Sequence[str]) -> str:
    baseline = _escaped(result.baseline)
    measured = f'Step, memory: time and peak memory of a training step over those of {baseline}. '
    return (
        'Accuracy in percent after the last epoch: mean and standard deviation over seeds. Difference: mean of the '
        f'paired differences to {baseline} in points, with its 95 % interval. Trained: parameters that are trained; '
        f'new: those that were put in. {measured if "step" in header else ""}File: what is to be kept beside the base.'
    )


_SPECIAL = {
    '\\': r'\textbackslash{}',
    '−': '$-$',
    '±': r'$\pm$',
    '×': r'$\times$',
    '–': '--',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '…': r'\ldots{}',
    **{sign: f'\\{sign}' for sign in '&%$#_{}'},
}


def as_latex(result: ComparisonResult) -> str:
    """A table for a document; it needs the package booktabs."""
    header, rows = _cells(result)
    lines = [
        f'% {heading(result)}',
        r'\begin{tabular}{l' + 'r' * (len(header) - 1) + '}',
        r'\toprule',
        _latex_row(header),
        r'\midrule',
        *map(_latex_row, rows),
        r'\bottomrule',
        r'\end{tabular}',
    ]
    return '\n'.join(lines) + '\n'


def _latex_row(cells: Sequence[str]) -> str:
    return ' & '.join(''.join(_SPECIAL.get(sign, sign) for sign in cell) for cell in cells) + r' \\'


def as_csv(result: ComparisonResult) -> str:
    """One line for each row, with all digits; an empty cell is what there is not."""
    columns: dict[str, Callable[[RowResult], object]] = {
        'row': lambda row: row.name,
        'operation': lambda row: row.row.operation,
        'train': lambda row: row.row.train,
        'lr': lambda row: row.lr,
        'seeds': lambda row: len(row.accuracies),
        'diverged': lambda row: len(row.diverged),
        'refused': lambda row: row.refused,
        'accuracy': lambda row: row.mean,
        'spread': lambda row: row.spread,
        'loss': lambda row: row.loss,
        **{f'difference_{name}': _of('difference', name) for name in ('mean', 'low', 'high', 'num_pairs', 'needed')},
        **{name: _of('costs', name) for name in _COSTS},
        **{f'accuracy_seed_{seed}': _of_seed(seed) for seed in _seeds(result)},
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(columns)
    writer.writerows([[value(row) for value in columns.values()] for row in result.rows])
    return text.getvalue()


_COSTS = (
    *('parameters', 'new_parameters', 'trained_parameters', 'macs', 'file_bytes'),
    *('batch_size', 'step_seconds', 'step_ratio', 'peak_mib', 'peak_ratio'),
)


def _of(part: str, name: str) -> Callable[[RowResult], object]:
    return lambda row: getattr(getattr(row, part), name, None)


def _of_seed(seed: int) -> Callable[[RowResult], object]:
    return lambda row: row.accuracies.get(seed)


def _seeds(result: ComparisonResult) -> list[int]:
    return sorted({seed for row in result.rows for seed in row.accuracies})


def _cells(result: ComparisonResult) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the tables that people read; columns in which nothing stands are left out."""
    columns: dict[str, Callable[[RowResult], str]] = {
        'row': lambda row: row.name,
        'seeds': lambda row: f'{len(row.accuracies)}' + (f' of {_all(row)}' if row.diverged else ''),
        'accuracy': _accuracy,
        'difference': lambda row: _pointwise(row, 'mean'),
        '95 % interval': _interval,
        'lr': lambda row: _NOTHING if row.lr is None or result.search is None else f'{row.lr:g}',
        'trained': lambda row: _number(row, 'trained_parameters'),
        'new': lambda row: _number(row, 'new_parameters'),
        'MACs': _macs,
        'step': lambda row: _ratio(row, 'step_ratio'),
        'memory': lambda row: _ratio(row, 'peak_ratio'),
        'file': lambda row: _NOTHING if row.costs is None else _size(row.costs.file_bytes),
    }
    cells = [[text(row) for text in columns.values()] for row in result.rows]
    kept = [n for n, name in enumerate(columns) if n < 3 or any(row[n] != _NOTHING for row in cells)]
    return [list(columns)[n] for n in kept], [[row[n] for n in kept] for row in cells]


def _all(row: RowResult) -> int:
    return len(row.accuracies) + len(row.diverged)


def _accuracy(row: RowResult) -> str:
    if row.refused is not None:
        return 'refused'
    if row.mean is None:
        return 'diverged' if row.diverged else _NOTHING
    spread = '' if row.spread is None else f' ± {100 * row.spread:.2f}'
    return f'{100 * row.mean:.2f}{spread}'


def _pointwise(row: RowResult, name: str) -> str:
    value = getattr(row.difference, name, None)
    return _NOTHING if value is None else points(value)


def _interval(row: RowResult) -> str:
    found = row.difference
    if found is None or found.low is None or found.high is None:
        return _NOTHING
    return f'{points(found.low)} to {points(found.high)}'


def _number(row: RowResult, name: str) -> str:
    return _NOTHING if row.costs is None else f'{getattr(row.costs, name):,}'


def _macs(row: RowResult) -> str:
    return _NOTHING if row.costs is None or row.costs.macs is None else f'{row.costs.macs / 1e6:,.1f} M'


def _ratio(row: RowResult, name: str) -> str:
    value = getattr(row.costs, name, None)
    return _NOTHING if value is None else f'{value:.2f}×'


def _size(number: int) -> str:
    return f'{number / 1e6:.2f} MB' if number >= 1e4 else f'{number / 1e3:.1f} kB'
