"""Class, register and distillation tokens are told from those of the image: they are gated and not pooled."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import sem_timm
from sem_timm import OptionError
from tests.families import FAMILIES
from tests.surgery.gates_by_hand import assert_gated_by_hand, instance_enhancement, vision_transformer
from tests.versions import weightless


@pytest.mark.parametrize(
    ('architecture', 'options'),
    [
        ('test_vit', {'img_size': 64}),
        ('test_vit', {'img_size': 64, 'reg_tokens': 4}),
        ('test_vit', {'img_size': 64, 'reg_tokens': 3, 'class_token': False, 'global_pool': 'avg'}),
        ('test_vit', {'img_size': 64, 'reg_tokens': 2, 'no_embed_class': True}),
        ('test_vit3', {'img_size': 64}),
        ('test_vit4', {'img_size': 64}),
        ('deit_tiny_distilled_patch16_224', {'img_size': 64, 'depth': 2}),
        ('deit3_small_patch16_224', {'img_size': 64, 'depth': 2}),
        ('eva02_tiny_patch14_224', {'img_size': 56, 'depth': 2}),
        ('vit_small_patch16_dinov3', {'img_size': 64, 'depth': 2}),
        ('beit_base_patch16_224', {'img_size': 64, 'depth': 2, 'embed_dim': 48, 'num_heads': 2}),
        ('pit_ti_224', {'img_size': 64}),
        ('pit_ti_distilled_224', {'img_size': 64}),
        ('vit_relpos_base_patch16_clsgap_224', {'img_size': 64, 'depth': 2, 'embed_dim': 48, 'num_heads': 2}),
    ],
)
def test_prefix_tokens_are_those_that_timm_counts(architecture: str, options: dict[str, Any]) -> None:
    model = timm.create_model(architecture, num_classes=10, **options)
    expected = getattr(model, 'num_prefix_tokens', None)
    if expected is None:
        expected = model.num_tokens  # pit
    for branches in ('last', 'all'):
        plan = sem_timm.plan_model(model, branches=branches)
        assert {site.num_prefix_tokens for site in plan} == {expected}
        grid = plan.sites[0].shape[1] - expected
        assert int(grid**0.5) ** 2 == grid


def test_prefix_tokens_do_not_enter_the_pooling_and_are_gated() -> None:
    model = vision_transformer(reg_tokens=2)
    gates = instance_enhancement(model)
    assert_gated_by_hand(model, torch.randn(2, 3, 64, 64), gates, (1,), (1, 16), skip=3)
    gate = gates['blocks.0.ie']
    x = torch.randn(2, 19, 16)
    other = x.clone()
    other[:, :3] += 1
    assert torch.equal(gate.gate(x), gate.gate(other))
    assert not torch.equal(gate(x)[:, :3], x[:, :3])
    with pytest.raises(OptionError, match='above 3'):
        gate(x[:, :3])


def test_class_attention() -> None:
    model = FAMILIES['xcit'].create()
    plan = sem_timm.plan_model(model, input_size=(3, 64, 64))
    assert {(site.class_name, site.num_prefix_tokens) for site in plan} == {('XCABlock', 0)}
    plan = sem_timm.plan_model(model, target=r'cls_attn_blocks\.\d+', input_size=(3, 64, 64))
    assert {(site.num_prefix_tokens, site.shape[1]) for site in plan} == {(1, 17)}
    cait = timm.create_model('cait_xxs24_224', img_size=64, num_classes=10)
    plan = sem_timm.plan_model(cait, target=r'blocks\.\d+')
    assert {(site.num_prefix_tokens, site.shape[1]) for site in plan} == {(0, 16)}


def test_class_tokens_alone_have_nothing_to_pool_over() -> None:
    """CaiT's last blocks and CrossViT's fusion hand on class tokens only, and those do not enter the pooling."""
    for architecture, options, target, class_name in (
        ('cait_xxs24_224', {'img_size': 64}, r'blocks_token_only\.\d+', 'LayerScaleBlockClassAttn'),
        ('crossvit_9_240', {}, r'blocks\.\d+\.fusion\.\d+', 'CrossAttentionBlock'),
    ):
        model = weightless(architecture, num_classes=10, **options)
        with pytest.raises(sem_timm.RefusedError, match='no positions to pool over'):
            sem_timm.plan_model(model, target=target)
        plan = sem_timm.plan_model(model)
        assert class_name not in {site.class_name for site in plan}
        assert class_name in {refusal.class_name for refusal in plan.refusals}
