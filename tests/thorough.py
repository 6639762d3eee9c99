"""Which tests of a matrix every run has, and which only ``pytest -m thorough`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest

thorough = pytest.mark.thorough


def first_of_each(
    cells: Iterable[Any], kind: Callable[..., Hashable] = lambda *values: None, *, count: int = 1
) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, of which all but the first of each kind are marked ``thorough``.

    Args:
        cells: A value for one parameter each, a tuple of values for several, or what `pytest.param` made of them.
        kind: What one cell is to show, told from its values; cells of one kind show the same in other models. By
            default all of them do.
        count: How many cells of each kind every run has.
    """
    seen: Counter[Hashable] = Counter()
    parameters = []
    for cell in cells:
        parameter = _parameter(cell)
        shown = kind(*parameter.values)
        seen[shown] += 1
        if seen[shown] > count:
            parameter = pytest.param(*parameter.values, id=parameter.id, marks=[*parameter.marks, thorough])
        parameters.append(parameter)
    return parameters


def _parameter(cell: Any) -> Any:
    if isinstance(cell, type(pytest.param())):
        return cell
    return pytest.param(*cell) if isinstance(cell, tuple) else pytest.param(cell)
