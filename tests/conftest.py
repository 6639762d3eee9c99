"""Fixtures and settings for all tests."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, Family

torch.set_num_threads(1)  # the tests run in parallel processes


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return FAMILIES[request.param]
