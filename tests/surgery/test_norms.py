"""Gates behind every norm, in each family, and between a norm and its activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import sem_timm
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot
from tests.thorough import first_of_each
from tests.twins import trained

NORMS = (nn.BatchNorm2d, nn.LayerNorm)
WITH_ACTIVATIONS = ('efficientnet', 'regnet', 'mobilenetv4')


def norms(name: str, module: nn.Module) -> bool:
    return isinstance(module, NORMS)


@pytest.mark.parametrize('name', first_of_each([name for name in FAMILIES if name != 'nfnet'], count=4))
def test_a_gate_goes_behind_every_norm(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.create(), family.images()
    names = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    with torch.no_grad():
        expected = model(images)
        before = snapshot(model)
        plan = sem_timm.plan_model(model, 'ie', position='output', target=norms, input_size=family.input_size)
        refused = {refusal.name: refusal.reason for refusal in plan.refusals}
        assert all('nothing but class tokens' in reason for reason in refused.values())
        assert [site.name for site in plan] == [name for name in names if name not in refused]
        sem_timm.patch_model(model, plan)
        assert torch.equal(model(images), expected)
        for site in plan:  # each of them counts
            gate = model.get_submodule(f'{site.name}.{site.attribute}.operators.ie')
            gate.beta.add_(0.5)
            assert not torch.equal(model(images), expected), site.name
            gate.beta.sub_(0.5)
        sem_timm.unpatch_model(model)
        assert torch.equal(model(images), expected)
    before['rng'] = torch.get_rng_state()  # what is inserted draws its first values
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('name', first_of_each([name for name in FAMILIES if name in WITH_ACTIVATIONS], count=2))
def test_what_goes_between_norm_and_activation(name: str) -> None:
    """As SSF and IEBN were published, by the place that timm has there for something to drop."""
    family = FAMILIES[name]
    model, images = family.create(), family.images()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)}
    with torch.no_grad():
        expected = model(images)
        places = [f'{name}.drop' for name in norms]
        sem_timm.patch_model(model, 'ssf', position='output', target=places, input_size=family.input_size)
        assert torch.equal(model(images), expected)
        assert {part.name for part in sem_timm.patched_modules(model)} == set(places)
        trained(model)
        adapted = model(images)
        for name, norm in norms.items():
            between: Any = model.get_submodule(f'{name}.drop.ssf')
            norm.bias.mul_(between.scale).add_(between.shift)
            norm.weight.mul_(between.scale)
        sem_timm.unpatch_model(model)
        torch.testing.assert_close(model(images), adapted, rtol=1e-3, atol=1e-3 * float(adapted.abs().max()))
    assert not torch.equal(adapted, expected)
