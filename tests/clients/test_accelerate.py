"""Offloading by accelerate: weights are on the CPU or on disk, and come when a module is called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from tests.clients.models import assert_close, images, models, swapped

PROGRAM = 'accelerate'
PACKAGES = ('accelerate',)


@pytest.mark.parametrize('where', ['cpu', 'disk'])
def test_offloaded(where: str, tmp_path: Path) -> None:
    """`cpu_offload` and `disk_offload`: outputs of SEM, and of External Attention"""

    def use(model: Any) -> Any:
        model = copy.deepcopy(model)
        if where == 'cpu':
            cpu_offload(model, execution_device=torch.device('cpu'))
        else:
            folder = tmp_path / str(len(list(tmp_path.iterdir())))  # of this model alone
            disk_offload(model, str(folder), execution_device=torch.device('cpu'))
        with torch.no_grad():
            return model(images())

    models().compare_with_plain_use(use, images())
    model = swapped(img_size=64)
    with torch.no_grad():
        expected = model(images())
    assert_close(use(model), expected)
