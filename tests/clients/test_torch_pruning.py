"""Channels pruned by Torch-Pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning

import sem_timm
from tests.clients.models import images
from tests.families import create
from tests.twins import trained

PROGRAM = 'torch-pruning'
PACKAGES = ('torch_pruning',)


def pruned(model: Any) -> Any:
    model = copy.deepcopy(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    torch_pruning.pruner.MagnitudePruner(
        model, images(), importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc], round_to=8
    ).step()
    return model


@pytest.mark.parametrize('operation', ['se', 'eca', 'ie', 'sem'])
def test_pruned_gates(operation: str) -> None:
    """Half of the channels pruned, gates among them; the model runs, trains, and its gates count"""
    plain = create('test_resnet', num_classes=8)
    model = pruned(trained(sem_timm.patch_model(copy.deepcopy(plain), operation)))
    before = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    out = model(images())
    out.sum().backward()
    with torch.no_grad(), sem_timm.disabled(model):
        assert not torch.allclose(model(images()), out, atol=1e-4)
