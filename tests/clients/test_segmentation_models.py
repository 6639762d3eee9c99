"""Segmentation by segmentation-models-pytorch, whose universal encoders are models of timm."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import torch

import sem_timm
from tests.clients.models import Models, assert_close, images
from tests.lively import lively
from tests.twins import trained

PROGRAM = 'segmentation-models-pytorch'
PACKAGES = ('segmentation_models_pytorch',)


def test_variant_as_encoder() -> None:
    """A variant as encoder, `tu-resnet18_sem`, with the weights of a model on the base"""
    base = lively(smp.Unet('tu-resnet18', encoder_weights=None)).eval()
    model: Any = smp.Unet('tu-resnet18_sem', encoder_weights=None).eval()
    assert {gate.form for gate in model.modules() if isinstance(gate, sem_timm.SEM)} == {'paper'}
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        assert_close(model(images()), base(images()))


def test_unet_on_a_patched_encoder() -> None:
    """Masks of a U-Net whose encoder was patched in place"""
    plain = lively(smp.Unet('tu-resnet18', encoder_weights=None)).eval()
    patched = smp.Unet('tu-resnet18', encoder_weights=None).eval()
    patched.load_state_dict(plain.state_dict())
    sem_timm.patch_model(patched.encoder.model, input_size=(3, 64, 64))
    stirred = smp.Unet('tu-resnet18', encoder_weights=None).eval()
    stirred.load_state_dict(plain.state_dict())
    trained(sem_timm.patch_model(stirred.encoder.model, input_size=(3, 64, 64)))

    def use(model: Any) -> Any:
        with torch.no_grad():
            return model(images())

    Models(plain, patched, stirred).compare(use)
