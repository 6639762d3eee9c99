"""The variants with Monarch attention: the only ones with another attention that claim pretrained weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, register_model
from torch import nn

import sem_timm
from sem_timm import MonarchAttention, SwapWarning
from sem_timm.compat import get_arch_pretrained_cfgs
from sem_timm.registry.table import read_table
from sem_timm.registry.variant_operation import VariantOperation
from tests.registry.models import BASES, assert_equal, image, outputs
from tests.thorough import first_of_each
from tests.versions import since_timm

MONARCH = VariantOperation('monarch')


def create(name: str, **kwargs: Any) -> tuple[nn.Module, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = timm.create_model(name, **kwargs)
    return model, caught


SAMPLE = [
    ('vit_tiny_patch16_224', 12),
    ('swin_tiny_patch4_window7_224', 0),
    ('beit_base_patch16_224', 0),
    ('pvt_v2_b0', 2),
    ('resnet50', 0),
    ('hiera_tiny_224', 0),
    ('crossvit_tiny_240', 15),
    ('vit_small_patch16_dinov3_qkvb', 12),
]


@pytest.mark.parametrize(('architecture', 'sites'), first_of_each(SAMPLE, lambda architecture, sites: sites > 0))
def test_table_counts_sites_where_nothing_is_lost(architecture: str, sites: int) -> None:
    with torch.device('meta'):
        model = timm.create_model(architecture)
    try:
        plan = sem_timm.plan_model(model, 'monarch')
        found = 0 if plan.needs_training else len(plan)
    except sem_timm.RefusedError:
        found = 0
    assert read_table().count(architecture, MONARCH) == found == sites


@since_timm('1.0.31', 'architecture that the table does not know')
def test_variants_are_where_the_attention_is_close() -> None:
    table = read_table()
    named = {name.removesuffix('_monarch') for name in timm.list_models('*_monarch')}
    assert named == {name for name in BASES if table.count(name, MONARCH)}
    assert len(named) >= 300
    assert not is_model('swin_tiny_patch4_window7_224_monarch') and not is_model('resnet50_monarch')


def test_pretrained_weights_are_those_of_the_base() -> None:
    for name in ('vit_small_patch16_224', 'eva02_tiny_patch14_224', 'test_vit'):
        cfgs, mirrored = get_arch_pretrained_cfgs(name), get_arch_pretrained_cfgs(f'{name}_monarch')
        assert [cfg.hf_hub_id for cfg in mirrored.values()] == [cfg.hf_hub_id for cfg in cfgs.values()]
        assert timm.models.is_model_pretrained(f'{name}_monarch')
    assert 'vit_small_patch16_224_monarch.augreg_in21k_ft_in1k' in timm.list_pretrained('vit_small*_monarch*')
    default = get_pretrained_cfg('vit_small_patch16_224_monarch')
    assert default is not None and default.has_weights and default.tag == 'augreg_in21k_ft_in1k'


def test_a_pretrained_variant_says_once_what_was_measured(base_weights: Callable[..., str]) -> None:
    overlay = dict(file=base_weights('test_vit'))
    base = timm.create_model('test_vit', pretrained=True, pretrained_cfg_overlay=overlay)
    for name in ('test_vit_monarch', 'test_vit_monarch.r160_in1k'):
        model, caught = create(name, pretrained=True, pretrained_cfg_overlay=overlay, monarch_passes=2)
        (warning,) = caught
        assert warning.category is SwapWarning and warning.filename == __file__
        message = str(warning.message)
        assert 'which is close to its own, without training' in message and MonarchAttention.fidelity in message
        assert 'needs training' not in message and 'unpatch_model(model)' in message
        cores = [module for module in model.modules() if isinstance(module, MonarchAttention)]
        assert len(cores) == 6 and {core.passes for core in cores} == {2}
        assert list(model.state_dict()) == list(base.state_dict())
        assert all(torch.equal(model.state_dict()[key], value) for key, value in base.state_dict().items())
        assert_equal(outputs(sem_timm.unpatch_model(model), image(160)), outputs(base, image(160)))


def test_features_and_other_sizes(base_weights: Callable[..., str]) -> None:
    overlay = dict(file=base_weights('test_vit'))
    model, caught = create('test_vit_monarch', pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert [warning.category for warning in caught] == [SwapWarning]
    base = timm.create_model('test_vit', features_only=True)
    assert [x.shape for x in model(image(160))] == [x.shape for x in base(image(160))]
    wide, caught = create('test_vit_monarch', img_size=(96, 160))
    cores = [module for module in wide.modules() if isinstance(module, MonarchAttention)]
    assert caught == [] and {core.grid_size for core in cores} == {(6, 10)}


def test_of_a_newer_architecture_no_weights_are_claimed(registrations: None) -> None:
    def newer_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return model_entrypoint('test_vit')(pretrained=pretrained, **kwargs)

    newer_vit.__module__ = __name__
    register_model(newer_vit)
    sem_timm.register_variants()
    assert is_model('newer_vit_monarch') and not timm.models.is_model_pretrained('newer_vit_monarch')
    assert 'newer_vit_monarch' not in timm_registry._model_with_tags or timm.list_pretrained('newer_vit_monarch*') == []
