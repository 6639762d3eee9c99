"""What the matrix consists of: a cell is a capability, an operation and a column, and is one test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

from tests.compatibility.exceptions import EXCEPTIONS, CannotWork, DoesNotApply
from tests.compatibility.families import OPERATIONS, columns_of
from tests.thorough import first_of_each

# The rooms of the capabilities, in the order of the table.
SUBJECTS = {
    'features': 'Features',
    'heads': 'Heads and parts of models',
    'sizes': 'Sizes of images',
    'groups': 'Groups of parameters',
    'checkpointing': 'Gradient checkpointing',
    'copies': 'Copies and averages',
    'folding': 'Pruned and reparameterised models',
    'compiling': 'Compilers',
    'exporting': 'Export',
    'precision': 'Precision and memory layout',
    'distributed': 'Several processes',
    'functional': 'torch.func',
}


@dataclass(frozen=True)
class Capability:
    """A row of the matrix.

    Attributes:
        name: Name of the test without ``test_``.
        title: What it is called in the table.
        operations: The operations it is tested with.
    """

    name: str
    title: str
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One test of the matrix."""

    capability: str
    operation: str
    column: str

    @property
    def id(self) -> str:
        return f'{self.operation}-{self.column}'

    @property
    def exception(self) -> DoesNotApply | CannotWork | None:
        """Why the cell does not apply or cannot work, if so."""
        (found,) = [e for e in EXCEPTIONS if e.covers(self.capability, self.operation, self.column)] or [None]
        return found


def capability(
    title: str, *, operations: tuple[str, ...] = OPERATIONS, shown_by: str = '', slow: bool = False
) -> Callable[[Any], Any]:
    """Makes a test a row of the matrix: it runs with the twins of each cell that applies.

    Every run has the first cell of each operation that works, and the first that cannot; the others are `thorough`.

    Args:
        title: What the row is called in the table.
        operations: The operations that the row makes sense for.
        shown_by: The column that every run has, where the row shows nothing in the first one.
        slow: Whether its cells take long.
    """

    def mark(check: Any) -> Any:
        row = Capability(check.__name__.removeprefix('test_'), title, operations)
        check.capability = row
        cells = [_parameter(cell) for cell in cells_of(row) if not isinstance(cell.exception, DoesNotApply)]
        if slow:
            return pytest.mark.slow(pytest.mark.parametrize('twins', cells, indirect=True)(check))
        cells.sort(key=lambda parameter: parameter.values[0].column != shown_by)
        cells = first_of_each(cells, lambda cell: (cell.operation, cell.exception is None))
        return pytest.mark.parametrize('twins', cells, indirect=True)(check)

    return mark


def _parameter(cell: Cell) -> Any:
    exception = cell.exception
    if exception is None:
        return pytest.param(cell, id=cell.id)
    expected = pytest.mark.xfail(strict=True, reason=exception.reason, raises=exception.raises)
    return pytest.param(cell, id=cell.id, marks=expected)


def cells_of(row: Capability) -> list[Cell]:
    """All cells of a row, whether they apply or not."""
    return [Cell(row.name, operation, column) for operation in row.operations for column in columns_of(operation)]


def capabilities() -> Iterator[tuple[str, list[Capability]]]:
    """The rows of the table under the titles of their subjects."""
    for subject, title in SUBJECTS.items():
        module = import_module(f'tests.compatibility.test_{subject}')
        checks = [check for _, check in inspect.getmembers(module) if hasattr(check, 'capability')]
        checks.sort(key=lambda check: check.__code__.co_firstlineno)
        yield title, [check.capability for check in checks]
