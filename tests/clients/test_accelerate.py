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
        x = images().to(next(model.parameters()).dtype)
        if where == 'cpu':
            cpu_offload(model, execution_device=torch.device('cpu'))
        else:
            folder = tmp_path / str(len(list(tmp_path.iterdir())))  # of this model alone
            disk_offload(model, str(folder), execution_device=torch.device('cpu'))
        with torch.no_grad():
            return model(x)

    given = models()
    for model in (given.plain, given.patched, swapped(img_size=64)):
        with torch.no_grad():
            expected = model(images())
        assert_close(use(model), expected)
    # A gate that is looked at calls its convolution as a layer, and others as one of an image, which on some CPUs is
    # rounded otherwise: these are the same numbers, not the same bits.
    stirred = given.stirred.double()
    with torch.no_grad():
        expected = stirred(images().double())
    assert_close(use(stirred), expected, 1e-13)
