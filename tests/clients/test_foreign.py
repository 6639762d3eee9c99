"""Models of other libraries: read, patched, compared in numbers, and given back."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.lively import lively
from tests.outputs import outputs
from tests.swap.swapping import swap
from tests.twins import trained

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))
SUBJECTS: Any = importlib.import_module('foreign_models').SUBJECTS
sys.path.pop()

PROGRAM = "other libraries' models"
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings('default')]

# Models in which nothing takes SEM by itself; the others take it.
WITHOUT_BLOCKS = {'shufflenet_v2_x0_5', 'vgg11_bn', 'DenseNet', "Unet('densenet121')", "Unet('vgg11_bn')"}
UNREAD = {'retinanet_resnet50_fpn'}
WITH_ATTENTION = {
    'nn.TransformerEncoder behind patches': 2,
    'VisionTransformer': 2,
    'SwinTransformer': 4,
    'SwinTransformer, version 2': 4,
    'MaxVit': 4,
    'ViTModel': 2,
    'ViTForImageClassification': 2,
    'DeiTModel': 2,
    'SwinModel': 4,
    'Swinv2Model': 4,
    'Dinov2Model': 2,
    'BeitModel': 2,
    'CLIPVisionModel': 2,
    'SiglipVisionModel': 2,
    'SegformerForSemanticSegmentation': 4,
    'CLIP, visual': 2,
    "Unet('mit_b0')": 8,
    'AutoencoderKL': 2,
    "DetectionModel('yolo11n.yaml')": 1,
    "ClassificationModel('yolo11n-cls.yaml')": 1,
    'ViT': 2,
}


def made(name: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """A model of the table, an input, and its size."""
    (subject,) = [each for each in SUBJECTS if each.name == name]
    pytest.importorskip(subject.library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = lively(subject.create())
    return model, torch.randn(2, *subject.input_size), subject.input_size


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a model returns; some draw random numbers even in inference."""
    torch.manual_seed(1)
    found = outputs(lambda x: _sample(model(x)), x)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _sample(returned: Any) -> Any:
    return getattr(returned, 'sample', returned)  # of diffusers'


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize('name', [s.name for s in SUBJECTS if s.name not in WITHOUT_BLOCKS | UNREAD])
def test_gates(name: str) -> None:
    """SEM in models of torchvision, transformers, open_clip, smp, diffusers, ultralytics and MONAI"""
    model, x, size = made(name)
    base = run(model, x)
    sem_timm.patch_model(model, input_size=size)
    assert equal(run(model, x), base)
    assert not equal(run(trained(model), x), base)
    sem_timm.unpatch_model(model)
    assert equal(run(model, x), base)


@pytest.mark.parametrize('name', WITH_ATTENTION)
def test_attention(name: str) -> None:
    """External Attention in the transformers among them"""
    model, x, size = made(name)
    base, keys = run(model, x), list(model.state_dict())
    swap(model, input_size=size)
    assert len(sem_timm.patched_modules(model)) == WITH_ATTENTION[name]
    first = run(model, x)
    assert not equal(first, base) and [t.shape for t in first] == [t.shape for t in base]
    assert not equal(run(trained(model), x), first)
    sem_timm.unpatch_model(model)
    assert equal(run(model, x), base) and list(model.state_dict()) == keys


@pytest.mark.parametrize('name', sorted(WITHOUT_BLOCKS))
def test_networks_without_blocks_take_modules_by_name(name: str) -> None:
    """SEM by `target=` in networks without blocks of their own"""
    model, x, size = made(name)
    with pytest.raises(sem_timm.RefusedError, match=r"target='([\w.]+)'") as caught:
        sem_timm.plan_model(model, input_size=size)
    target = str(caught.value).rpartition("target='")[2].partition("'")[0]
    base = run(model, x)
    sem_timm.patch_model(model, target=target, input_size=size)
    assert equal(run(model, x), base) and not equal(run(trained(model), x), base)


@pytest.mark.parametrize('name', sorted(UNREAD))
def test_detectors_name_their_backbone(name: str) -> None:
    """SEM in the backbone of a detector"""
    model, _, size = made(name)
    with pytest.raises(
        sem_timm.OptionError, match=r'plan_model\(model\.backbone, \.\.\., input_size=\(3, \d+, \d+\)\)'
    ):
        sem_timm.plan_model(model, input_size=size)
    sem_timm.patch_model(model.backbone, input_size=(3, 64, 64))
    assert sem_timm.patched_modules(model)
