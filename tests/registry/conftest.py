"""Fixtures for the tests of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry as timm_registry

from tests.registry.models import train
from tests.versions import clear_model_entries


@pytest.fixture
def registrations() -> Iterator[None]:
    """Takes back what a test registers."""
    before = set(timm_registry._model_entrypoints)
    yield
    for name in timm_registry._model_entrypoints.keys() - before:
        del timm_registry._model_entrypoints[name]
        clear_model_entries(name)


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
