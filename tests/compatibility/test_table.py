"""The committed page, and the exceptions it names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import sem_timm
from tests.compatibility.cells import Cell, capabilities, cells_of
from tests.compatibility.exceptions import EXCEPTIONS, DoesNotApply
from tests.compatibility.families import COLUMNS, columns_of
from tests.compatibility.table import read, symbol
from tests.compatibility.twins import make

PAGE = Path(__file__).parents[2] / 'docs' / 'compatibility.md'


def test_the_page_has_exactly_the_cells_of_the_tests() -> None:
    expected = {
        (cell.operation, row.title, cell.column, symbol(cell))
        for _, rows in capabilities()
        for row in rows
        for cell in cells_of(row)
    }
    shown = Counter(read(PAGE.read_text()))
    assert set(shown) ^ expected == set(), 'python benchmarks/compatibility.py writes the page anew'
    assert set(shown.values()) == {1}


def test_exceptions_are_of_cells_that_there_are() -> None:
    cells = {(c.capability, c.operation, c.column) for _, rows in capabilities() for row in rows for c in cells_of(row)}
    for exception in EXCEPTIONS:
        for column in exception.columns:
            of = {(exception.capability, operation, column) for operation in exception.operations}
            assert of & cells, (exception, column)
    assert all(Cell(*cell).exception is None or Cell(*cell).exception in EXCEPTIONS for cell in cells)


def test_models_lack_what_is_said_not_to_apply() -> None:
    for exception in EXCEPTIONS:
        if isinstance(exception, DoesNotApply) and exception.lacks:
            for column in exception.columns:
                assert not hasattr(make('sem', column).base, exception.lacks), (exception.lacks, column)


@pytest.mark.parametrize('name', COLUMNS)
def test_columns_are_what_the_page_says_of_them(name: str) -> None:
    column = COLUMNS[name]
    layouts = {site.layout for part in sem_timm.patched_modules(make('sem', name).model) for site in part.sites}
    assert ', '.join(sorted(layouts)) == column.layout
    assert (name in columns_of('external')) == column.swappable
    if not column.swappable:
        with pytest.raises(sem_timm.RefusedError):
            sem_timm.plan_model(column.create(), 'external', input_size=column.input_size)
