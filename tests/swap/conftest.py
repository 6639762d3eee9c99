"""Fixtures for the tests of swaps."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """New cores draw their weights from the same numbers, whichever tests ran before."""
    torch.manual_seed(0)
