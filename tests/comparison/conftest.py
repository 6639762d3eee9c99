"""Images and weights for small comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison.small_comparisons import write_weights
from tests.finetuning.small_runs import write_images


@pytest.fixture(scope='session')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training and a validation split; not to be changed."""
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base in which gates act."""
    return write_weights(tmp_path_factory.mktemp('weights'))
