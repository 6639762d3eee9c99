"""A base model and its patched twin, with weights that tell them apart where they should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import FAMILIES, Family
from tests.thorough import first_of_each

SEVERAL = ('resnet', 'efficientnet', 'convnext', 'vit_registers', 'swin')
several = pytest.mark.parametrize('name', first_of_each(SEVERAL))


def both(name: str, **options: Any) -> tuple[Any, Any, Family]:
    """A base model, its patched twin with the same weights, and their family."""
    family = FAMILIES[name]
    model = family.create(**options)
    return model, sem_timm.patch_model(copy.deepcopy(model), input_size=family.input_size), family


def trained(model: nn.Module) -> nn.Module:
    """Gives every inserted module weights that change the output."""
    generator = torch.Generator().manual_seed(5)
    for parameter in inserted(model).values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def inserted(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the patch added, by name."""
    prefixes = tuple(f'{m.name}.{child}.' for m in sem_timm.patched_modules(model) for child in m.inserted)
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit, in nested lists, tuples and dictionaries too."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second), (first - second).abs().max()
        return
    if isinstance(first, dict):
        assert list(first) == list(second)
        first, second = list(first.values()), list(second.values())
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert_equal(one, other)
