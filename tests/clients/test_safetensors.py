"""Files of weights by safetensors, and timm's folders for its hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_model, save_model

import sem_timm  # noqa: F401
from tests.clients.models import assert_close, images, models
from tests.twins import trained
from tests.versions import save_for_hf, saves_arguments

PROGRAM = 'safetensors'
PACKAGES = ('safetensors',)


def test_model_goes_through_a_file(tmp_path: Path) -> None:
    """`save_model` and `load_model` of a patched model"""
    given = models()
    save_model(given.stirred, str(tmp_path / 'model.safetensors'))
    missing, unexpected = load_model(given.patched, str(tmp_path / 'model.safetensors'))
    assert not missing and not unexpected
    with torch.no_grad():
        assert_close(given.patched(images()), given.stirred(images()))


@saves_arguments
def test_folder_of_the_hub(tmp_path: Path) -> None:
    """`timm.models.save_for_hf` of a variant, and `timm.create_model` from the folder"""
    model: Any = trained(timm.create_model('test_resnet_sem', num_classes=8)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert_close(loaded(images()), model(images()))
