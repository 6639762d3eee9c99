"""Promise 14: a gate behind a norm costs no activation memory, and gradients stay what they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.layers import ChannelGate, gate
from sem_timm.layers.gated_sum import follows
from tests.families import FAMILIES
from tests.layers.kept_bytes import kept_bytes
from tests.outputs import loss_of
from tests.thorough import first_of_each, thorough
from tests.twins import trained
from tests.versions import tells_saved_tensors_hooks

pytestmark = tells_saved_tensors_hooks

# Families whose branches end in a batch norm or a layer scale, everywhere.
_FREE = ('resnet', 'regnet', 'convnext', 'nfnet', 'hrnet', 'xcit')


def _by_ending(name: str) -> bool:
    return name in _FREE


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', first_of_each(FAMILIES, _by_ending, count=3))
def test_gradients_in_whole_networks(monkeypatch: pytest.MonkeyPatch, name: str, training: bool) -> None:
    family = FAMILIES[name]
    patched = trained(sem_timm.patch_model(family.create(), input_size=family.input_size)).double().train(training)
    images = family.images().double()

    def results() -> tuple[Any, dict[str, Tensor]]:
        model = copy.deepcopy(patched)  # some keep tensors between calls
        torch.manual_seed(3)  # for stochastic depth
        output = model(images)
        loss_of(output).backward()
        return output, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    kept: list[bool] = []
    monkeypatch.setattr(gate, 'follows', lambda *args: kept.append(follows(*args) is None) or follows(*args))
    output, gradients = results()
    assert kept
    if name in _FREE:
        assert not any(kept), name
    monkeypatch.setattr(gate, 'follows', lambda *args: None)
    expected_output, expected = results()
    torch.testing.assert_close(output, expected_output, rtol=0, atol=0)
    assert gradients.keys() == expected.keys()
    scale = max(float(each.norm()) for each in expected.values())
    for key, found in gradients.items():
        assert (found - expected[key]).norm() <= 1e-10 * (expected[key].norm() + 1e-3 * scale), key


@pytest.mark.parametrize('operation', first_of_each(['sem', 'se', 'eca', 'ie', 'lct']))
def test_blocks_of_a_resnet_keep_what_plain_ones_keep(operation: str) -> None:
    base, model = (timm.create_model('resnet50').train() for _ in range(2))
    sem_timm.patch_model(model, operation)
    images = torch.randn(1, 3, 224, 224)
    kept = [kept_bytes(lambda each=each: each(images), each) for each in (base, model)]  # type: ignore[misc]
    assert kept[1] <= 1.005 * kept[0]


@thorough
@pytest.mark.parametrize('name', ['regnety_008', 'efficientnet_b0', 'mobilenetv3_large_100', 'convnext_tiny'])
def test_other_networks_keep_what_plain_ones_keep(name: str) -> None:
    base, model = (timm.create_model(name).train() for _ in range(2))
    sem_timm.patch_model(model)
    images = torch.randn(1, 3, 224, 224)
    kept = [kept_bytes(lambda each=each: each(images), each) for each in (base, model)]  # type: ignore[misc]
    assert kept[1] <= 1.01 * kept[0]


def test_a_frozen_base_in_inference_keeps_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `freeze_base` of the training script does: norms stand still, gates learn."""
    model = sem_timm.patch_model(timm.create_model('test_resnet')).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ChannelGate):
            module.requires_grad_(True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    calls: list[bool] = []
    monkeypatch.setattr(gate, 'follows', lambda *args: calls.append(follows(*args) is not None) or follows(*args))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    # Before the first gate nothing has a gradient, and so nothing is kept that anything could follow from.
    assert calls == [False] + [True] * (len(calls) - 1)
