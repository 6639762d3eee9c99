"""Small models with SEM whose decisions differ, and batches of labelled images."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.lively import lively
from tests.twins import trained


def decided(architecture: str = 'test_resnet', **options: Any) -> nn.Module:
    """A model with SEM everywhere, and weights with which it decides differently for each image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lively(timm.create_model(architecture, num_classes=10))
    return trained(sem_timm.patch_model(model, 'sem', **options)).eval()


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches of images of 64 pixels, with labels from 0 to 2."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count * size, 3, 64, 64, generator=generator)
    return list(zip(images.split(size), (torch.arange(count * size) % 3).split(size)))
