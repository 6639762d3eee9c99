"""A tiny vision transformer with swapped attention, and images for it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sem_timm

SIZE = (1, 16, 16)

_SWAPPED: dict[str, Any] = {}


def create(**options: Any) -> nn.Module:
    """Two blocks of width 32, 16 patches and a class token, with weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {'img_size': 16, 'patch_size': 4, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
        model = timm.create_model('vit_tiny_patch16_224', in_chans=1, num_classes=4, **{**sizes, **options})
        for name, parameter in model.named_parameters():
            if 'qkv.weight' in name:
                nn.init.normal_(parameter, std=0.3)  # attention that is not uniform
    return model.eval()


def swapped(operation: Any = 'external', *, model: Any = None, **options: Any) -> Any:
    """The model with another attention; a copy of one that is swapped once, where no other model is given."""
    if operation == 'external':
        options = {'memory': 8, **options}
    if model is not None:
        return _swapped(operation, model, options)
    key = repr((operation, sorted(options.items())))
    if key not in _SWAPPED:
        _SWAPPED[key] = _swapped(operation, create(), options)
    return copy.deepcopy(_SWAPPED[key])


def _swapped(operation: Any, model: Any, options: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        torch.manual_seed(0)
        return sem_timm.patch_model(model, operation, **{'input_size': SIZE, **options})


def batches(count: int = 4, size: int = 16) -> list[Tensor]:
    """Images (size, 1, 16, 16), one batch after another."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *SIZE, generator=generator) for _ in range(count)]


def labelled(model: nn.Module, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images with the classes that a model gives them."""
    with torch.no_grad():
        return [(images, model(images).argmax(1)) for images in batches(count)]
