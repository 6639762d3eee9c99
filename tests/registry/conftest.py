"""Fixtures for the tests of the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.registry.models import train


@pytest.fixture
def base_weights(tmp_path: Path) -> Callable[..., str]:
    """Writes made-up weights of a base architecture to a file and tells its path."""

    def save(architecture: str, **kwargs: Any) -> str:
        path = tmp_path / f'{architecture}.pth'
        model = timm.create_model(architecture, **kwargs)
        train(model)
        torch.save(model.state_dict(), path)
        return str(path)

    return save
