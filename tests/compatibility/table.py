"""The matrix as a page: written from what the tests gave, and read back to compare it with what the tests hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tests.compatibility.cells import Cell, capabilities
from tests.compatibility.exceptions import CannotWork, DoesNotApply
from tests.compatibility.families import COLUMNS, columns_of
from tests.compatibility.twins import UnpatchedFails

WORKS, NOTHING_TO_TEST, CANNOT_WORK, BROKEN = '✓', '–', '✗', '!'
TITLES = {'sem': 'SEM (`sem`)', 'external': 'External Attention (`external`)'}

_HEAD = """# What works with a patched model

Each cell is a test in `tests/compatibility/`, which compares the patched model with the one before: SEM is an identity
at first, so that results and gradients are the same, bit for bit where both compute in the same way; and then again
after the new parameters were given other values, with the same model used plainly. {works} means that the test passes,
{nothing} that there is nothing to test, {cannot} that it cannot work, for the reason in the notes: its test is expected
to fail, and is an error if it passes. `benchmarks/compatibility.py` makes this page.

{versions}
"""


def write(outcomes: Mapping[str, str], versions: str) -> str:
    """The page in Markdown.

    Args:
        outcomes: What each test gave, by the id of its cell under the capability, such as 'deepcopy[sem-resnet]':
            'passed', 'xfailed' or else.
        versions: What the tests were run with.
    """
    parts = [_HEAD.format(works=WORKS, nothing=NOTHING_TO_TEST, cannot=CANNOT_WORK, versions=versions), _columns()]
    notes: dict[str, int] = {}
    for operation in TITLES:
        parts.append(f'## {TITLES[operation]}\n\n{_table(operation, outcomes, notes)}\n')
    parts.append('## Notes\n\n' + '\n'.join(f'{number}. {text}' for text, number in notes.items()) + '\n')
    return '\n'.join(parts)


def _columns() -> str:
    lines = ['## The families\n', '| column | model | features lie as | self-attention |', '|---|---|---|---|']
    for name, column in COLUMNS.items():
        lines.append(f'| {name} | `{column.architecture}` | {column.layout} | {column.attention or "none"} |')
    return '\n'.join([*lines, '\nAll are made small by options.\n'])


def _table(operation: str, outcomes: Mapping[str, str], notes: dict[str, int]) -> str:
    columns = columns_of(operation)
    lines = [f'| | {" | ".join(columns)} |', f'|---|{":-:|" * len(columns)}']
    for title, rows in capabilities():
        rows = [row for row in rows if operation in row.operations]
        if not rows:
            continue
        lines.append(f'| **{title}** |{" |" * len(columns)}')
        for row in rows:
            entries = [_entry(Cell(row.name, operation, column), outcomes, notes) for column in columns]
            lines.append(f'| {row.title} | {" | ".join(entries)} |')
    return '\n'.join(lines)


def _entry(cell: Cell, outcomes: Mapping[str, str], notes: dict[str, int]) -> str:
    exception = cell.exception
    if not isinstance(exception, DoesNotApply):
        outcome = outcomes.get(f'{cell.capability}[{cell.id}]', 'missing')
        if outcome != ('passed' if exception is None else 'xfailed'):
            return BROKEN
    if exception is None:
        return WORKS
    text = exception.reason
    if isinstance(exception, CannotWork) and exception.raises is UnpatchedFails:
        text = f"timm's own model cannot do it: {text}"
    number = notes.setdefault(f'{text[0].upper()}{text[1:]}.', len(notes) + 1)
    return f'{symbol(cell)} ({number})'


def symbol(cell: Cell) -> str:
    """What the page should show for a cell, by what the tests expect."""
    exception = cell.exception
    if exception is None:
        return WORKS
    return NOTHING_TO_TEST if isinstance(exception, DoesNotApply) else CANNOT_WORK


def read(page: str) -> Iterator[tuple[str, str, str, str]]:
    """Operation, title of the row, column and symbol of each cell of a page."""
    operation, columns = '', []
    for line in page.splitlines():
        for name, title in TITLES.items():
            if line == f'## {title}':
                operation, columns = name, []
        cells = [cell.strip() for cell in line.strip('|').split('|')] if line.startswith('|') and operation else []
        if cells and not columns:
            columns = cells[1:]
        elif cells and not cells[0].startswith(('---', '**')):
            for column, entry in zip(columns, cells[1:], strict=True):
                yield operation, cells[0], column, re.sub(r' \(\d+\)$', '', entry)
