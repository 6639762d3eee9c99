"""EfficientDet on backbones of timm."""

from __future__ import annotations

from typing import Any

import torch
from effdet import EfficientDet, get_efficientdet_config

import sem_timm
from tests.clients.models import Models, images
from tests.lively import lively
from tests.twins import trained

PROGRAM = 'effdet'
PACKAGES = ('effdet',)


def detector() -> Any:
    config = get_efficientdet_config('tf_efficientdet_lite0')
    config.backbone_name, config.image_size, config.num_classes = 'efficientnet_lite0', [128, 128], 3
    return EfficientDet(config, pretrained_backbone=False).eval()


def test_classes_and_boxes() -> None:
    """Class logits and boxes of `EfficientDet`"""
    plain, others = lively(detector()), []
    for _ in range(2):
        other = detector()
        other.load_state_dict(plain.state_dict())
        sem_timm.patch_model(other.backbone, input_size=(3, 128, 128))
        others.append(other)
    trained(others[1].backbone)

    def use(model: Any) -> Any:
        with torch.no_grad():
            return model(images(1, 128))

    Models(plain, *others).compare(use)
