"""Fixtures for the cells of the matrix."""

from __future__ import annotations

import pytest
import torch

from tests.compatibility.cells import Cell
from tests.compatibility.twins import Twins, make


@pytest.fixture
def twins(request: pytest.FixtureRequest) -> Twins:
    """The models of a cell."""
    torch.manual_seed(0)
    cell: Cell = request.param
    return make(cell.operation, cell.column)
