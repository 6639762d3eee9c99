"""Towers of timm in open_clip."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel

import sem_timm
from tests.clients.models import Models, images
from tests.lively import lively
from tests.twins import trained

PROGRAM = 'open_clip_torch'
PACKAGES = ('open_clip',)


def test_image_tower() -> None:
    """Embeddings of a `TimmModel`"""
    plain = lively(TimmModel('test_resnet', embed_dim=16, image_size=64, pool='avg')).eval()
    others = []
    for _ in range(2):
        other = TimmModel('test_resnet', embed_dim=16, image_size=64, pool='avg').eval()
        other.load_state_dict(plain.state_dict())
        sem_timm.patch_model(other.trunk, input_size=(3, 64, 64))
        others.append(other)
    trained(others[1])

    def use(model: Any) -> Any:
        with torch.no_grad():
            return model(images())

    Models(plain, *others).compare(use)
