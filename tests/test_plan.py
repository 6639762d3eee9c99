"""Plans and the records of patches: what they show, count and convert to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import ExcitationConfig, InsertConfig, SEMConfig, TimmAttentionConfig
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot


class Own(nn.Module):
    """A module of one's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    'config',
    [
        SEMConfig(),
        SEMConfig(8, ('se', sem_timm.layers.excitation.InstanceEnhancement), 'paper', position='output'),
        ExcitationConfig('eca', position='residual', branches='all'),
        TimmAttentionConfig('gc'),
        InsertConfig(Own, name='own'),
        InsertConfig(lambda channels: nn.Identity()),
    ],
)
def test_a_plan_is_data(config: Any) -> None:
    model = FAMILIES['resnet'].create()
    plan = sem_timm.plan_model(model, config)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == plan.to_dict()
    assert data['model'] == 'ResNet' and data['input_size'] == [3, 160, 160]
    assert data['num_parameters'] == plan.num_parameters == sum(site['num_parameters'] for site in data['sites'])
    assert [site['name'] for site in data['sites']] == [site.name for site in plan]
    assert data['operation']['name'] == str(config) and data['operation']['position'] == config.position
    assert data['refusals'] == []


def test_a_plan_prints_a_line_for_each_site() -> None:
    model = FAMILIES['vgg'].create()
    plan = sem_timm.plan_model(model, target=r'features\.\d+', input_size=(3, 32, 32))
    header, rule, *lines = str(plan).splitlines()
    assert header.split() == ['site', 'class', 'position', 'layout', 'channels', 'new', 'parameters']
    assert set(rule) == {'-', ' '}
    rows = [line.split() for line in lines[: len(plan)]]
    assert rows == [
        [s.name, s.class_name, s.position, s.layout, f'{s.channels:,}', f'{s.num_parameters:,}'] for s in plan
    ]
    total, *refused = lines[len(plan) :]
    assert f'{len(plan)} sites' in total and f'{plan.num_parameters:,} new parameters' in total and 'VGG' in total
    assert '3 x 32 x 32' in total and not refused
    (site,) = one = sem_timm.plan_model(FAMILIES['resnet'].create(), target='layer1.0')
    assert '1 site,' in str(one) and site in list(one)


def test_a_plan_lists_what_it_refuses() -> None:
    model = FAMILIES['resnet'].create()
    classes = [type(model.layer1[0]).__name__, type(model.layer3[0]).__name__]
    sem_timm.patch_model(model, target=['layer1.0', 'layer3.0'])
    plan = sem_timm.plan_model(model)
    assert [refusal.name for refusal in plan.refusals] == ['layer1.0', 'layer3.0']
    assert [refusal.class_name.removeprefix('Patched') for refusal in plan.refusals] == classes
    *_, title, first, second = str(plan).splitlines()
    assert (
        title == 'Refused:'
        and 'layer1.0 (' in first
        and 'it is already patched (sem)' in first
        and 'layer3.0' in second
    )
    assert len(json.loads(json.dumps(plan.to_dict()))['refusals']) == 2


@pytest.mark.parametrize('name', ['resnet', 'vit_registers', 'vgg', 'hrnet'])
@pytest.mark.parametrize('branches', ['last', 'all'])
def test_a_plan_counts_what_patching_adds(name: str, branches: str) -> None:
    family = FAMILIES[name]
    model = family.create()
    plan = sem_timm.plan_model(model, input_size=family.input_size, branches=branches)
    assert len(plan) == len(list(plan)) == len(plan.sites) > 0
    before = sum(p.numel() for p in model.parameters())
    sem_timm.patch_model(model, plan)
    assert sum(p.numel() for p in model.parameters()) - before == plan.num_parameters
    for site in plan:
        new = model.get_submodule(f'{site.name}.{site.attribute}')
        assert sum(p.numel() for p in new.parameters()) == site.num_parameters
        assert new.channels == site.channels and new.channel_dim == site.channel_dim
    assert len(plan) == sum(len(record.inserted) for record in sem_timm.patched_modules(model))


def test_the_record_of_a_patch() -> None:
    model = FAMILIES['resnet'].create()
    of_the_third = type(model.layer3[0]).__name__
    assert sem_timm.patched_modules(model) == ()
    config = SEMConfig(8, branches='all')
    assert sem_timm.patch_model(model, config, target=r'layer[12]\..*') is model
    sem_timm.patch_model(model, 'timm_cbam', target='layer3.0', position='output')
    records = sem_timm.patched_modules(model)
    assert [(r.name, r.class_name, r.inserted, r.position) for r in records] == [
        ('layer1.0', 'BasicBlock', ('sem',), 'residual'),
        ('layer2.0', 'BasicBlock', ('sem',), 'residual'),
        ('layer3.0', of_the_third, ('timm_cbam',), 'output'),
    ]
    assert records[0].operation == config and records[2].operation == TimmAttentionConfig('cbam', position='output')


def test_patches_stack_and_undo_together() -> None:
    model, images = FAMILIES['resnet'].create(), FAMILIES['resnet'].images()
    before = snapshot(model)
    with torch.no_grad():
        expected = model(images)
    sem_timm.patch_model(model, 'eca', target='layer1.0')
    sem_timm.patch_model(model, Own, target='layer1.0.conv2')
    sem_timm.patch_model(model, target=r'layer[23]\..*')
    sem_timm.patch_model(model, 'timm_gc', target='layer4', position='output')
    assert [record.inserted for record in sem_timm.patched_modules(model)] == [
        ('eca',),
        ('inserted',),
        ('sem',),
        ('sem',),
        ('timm_gc',),
    ]
    with torch.no_grad():
        assert not torch.equal(expected, model(images))
        assert sem_timm.unpatch_model(model) is model
        assert torch.equal(expected, model(images))
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))
