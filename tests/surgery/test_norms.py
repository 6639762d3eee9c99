"""Gates behind every norm, in each family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sem_timm
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot
from tests.thorough import first_of_each

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


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
