"""Targets by PEFT's rules: a string matches whole names, a list holds names or dotted suffixes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import sem_timm
from sem_timm import NoMatchError, RefusedError
from tests.families import FAMILIES
from tests.versions import weightless

BLOCKS = ['layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']


def sites(name: str = 'resnet', **options: Any) -> list[str]:
    family = FAMILIES[name]
    return [site.name for site in sem_timm.plan_model(family.create(), input_size=family.input_size, **options)]


@pytest.mark.parametrize(
    ('target', 'expected'),
    [
        (None, BLOCKS),
        (r'layer[34]\..*', BLOCKS[2:]),
        (r'layer1\.0', BLOCKS[:1]),
        (r'.*\.0', BLOCKS),
        ('.*', BLOCKS),
        (r'layer(1|4)\.\d+', [BLOCKS[0], BLOCKS[3]]),
        (['layer3.0', 'layer1.0'], [BLOCKS[0], BLOCKS[2]]),
        (('layer2.0',), BLOCKS[1:2]),
        ({'layer2.0'}, BLOCKS[1:2]),
        (['0'], BLOCKS),
        (Bottleneck, BLOCKS[2:3]),
        (BasicBlock, [BLOCKS[0], BLOCKS[1], BLOCKS[3]]),
        (nn.Module, BLOCKS),
        (lambda name, module: name.endswith('.0') and hasattr(module, 'conv3'), BLOCKS[2:3]),
        (lambda name, module: getattr(module, 'downsample', None) is not None, BLOCKS[:4]),
    ],
)
def test_targets(target: Any, expected: list[str]) -> None:
    if callable(target) and not isinstance(target, type) and target.__code__.co_names[0] == 'getattr':
        model = FAMILIES['resnet'].create()
        expected = [name for name in BLOCKS if model.get_submodule(name).downsample is not None]
    assert sites(target=target) == expected
    rest = [name for name in BLOCKS if name not in expected]
    if rest and target is not None:
        assert sites(exclude=target) == rest


def test_a_string_is_no_prefix_and_no_suffix() -> None:
    for target in ('layer1.', 'ayer1.0', '0', 'layer1.0.'):
        with pytest.raises(NoMatchError, match=re.escape(repr(target))):
            sites(target=target)


def test_a_suffix_begins_at_a_dot() -> None:
    model = FAMILIES['vit_registers'].create()
    assert [site.name for site in sem_timm.plan_model(model, target=['blocks.1'])] == ['blocks.1']
    with pytest.raises(NoMatchError, match=r"'locks\.1'"):
        sem_timm.plan_model(model, target=['locks.1'])


def test_target_and_exclude() -> None:
    assert sites(target=r'layer[123]\..*', exclude=['layer2.0']) == [BLOCKS[0], BLOCKS[2]]
    assert sites(exclude=Bottleneck) == [BLOCKS[0], BLOCKS[1], BLOCKS[3]]
    # A stage that is excluded takes what is in it along.
    assert sites(exclude='layer1') == BLOCKS[1:]
    assert sites(exclude=r'layer1.*') == BLOCKS[1:]


def test_a_stage_means_its_last_block_and_a_pattern_all_of_them() -> None:
    """What a sequence of blocks returns is what its last block returns."""
    model = weightless('resnet26')
    assert [site.name for site in sem_timm.plan_model(model, target='layer1')] == ['layer1.1']
    assert [site.name for site in sem_timm.plan_model(model, target='layer1.*')] == ['layer1.0', 'layer1.1']


def test_modules_that_are_no_blocks_can_be_named() -> None:
    model = FAMILIES['resnet'].create()
    (site,) = sem_timm.plan_model(model, target=['layer1.0.conv2'])
    assert (site.name, site.position, site.channels) == ('layer1.0.conv2', 'output', 32)
    with pytest.raises(RefusedError, match='no children'):
        sem_timm.plan_model(model, target=['layer1.0.conv2'], position='residual')


def test_the_order_is_that_of_the_model() -> None:
    assert sites(target=['layer4.0', 'layer1.0', 'layer2.0']) == [BLOCKS[0], BLOCKS[1], BLOCKS[3]]


def test_each_entry_of_a_list_has_to_count() -> None:
    with pytest.raises(NoMatchError, match=r"'layer9\.0'"):
        sites(target=['layer1.0', 'layer9.0'])
    with pytest.raises(RefusedError, match='fc'):
        sites(target=['layer1.0', 'fc'])
    assert sites(target=['layer1.0', 'layer1.0']) == ['layer1.0']


def test_names_with_prefixes_of_wrappers() -> None:
    assert sites(target=['module.layer1.0', '_orig_mod.layer2.0']) == BLOCKS[:2]


@pytest.mark.parametrize('name', ['resnet', 'coatnet', 'fastvit', 'convmixer', 'efficientformer'])
def test_patching_twice_finds_no_other_places(name: str) -> None:
    others = {'fastvit': 'fastvit_t8', 'convmixer': 'convmixer_768_32', 'efficientformer': 'efficientformer_l1'}
    model = weightless(others[name]) if name in others else FAMILIES[name].create()
    sem_timm.patch_model(model)
    count = len(sem_timm.patched_modules(model))
    with pytest.raises(RefusedError, match=rf'(?s){count} blocks .*already patched'):
        sem_timm.patch_model(model)
    assert len(sem_timm.patched_modules(model)) == count


def test_patches_of_different_targets_stack() -> None:
    model = FAMILIES['coatnet'].create()
    everything = [site.name for site in sem_timm.plan_model(model)]
    sem_timm.patch_model(model, target=everything[:1])
    sem_timm.patch_model(model, 'eca', target=everything[1:2])
    plan = sem_timm.plan_model(model, 'se')
    assert [site.name for site in plan] == everything[2:]
    assert [refusal.name for refusal in plan.refusals] == everything[:2]
