"""Dropping what a swap made useless: the outputs stay, the parameters go, and there is no way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sem_timm
from sem_timm import ModelError
from tests.families import FAMILIES
from tests.refusals import refused
from tests.swap.classes import CLASSES, SHARED_TABLES, by_form
from tests.swap.swapping import backward, outputs, swap, swapped, without_gradient
from tests.twins import assert_equal

SWIN = CLASSES['models.swin_transformer.WindowAttention']
VIT = CLASSES['layers.attention.Attention']


@pytest.mark.parametrize(
    'name',
    by_form(
        [
            'layers.attention2d.MultiQueryAttention2d',
            'layers.halo_attn.HaloAttn',
            'models.efficientformer_v2.Attention2dDownsample',
            'models.gemma4_vit.Gemma4Attention',
            'models.levit.Attention',
            'models.maxxvit.AttentionCl',
            'models.mvitv2.MultiScaleAttention',
            'models.pvt_v2.Attention',
            'models.swin_transformer.WindowAttention',
            'models.swin_transformer_v2.WindowAttention',
            'models.tnt.Attention',
            *SHARED_TABLES,
        ]
    ),
)
def test_outputs_stay_and_parameters_go(name: str) -> None:
    family = {**CLASSES, **SHARED_TABLES}[name]
    model, images = family.create(), family.images()
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    swap(model, plan)
    expected, names = outputs(model, images), [n for n, _ in model.named_parameters()]
    still_computed = tuple(f'{module}.' for module in plan.computed)
    useless = {name for name in plan.unread if not name.startswith(still_computed)}
    assert sem_timm.drop_unread_parameters(model) is model
    assert [n for n, _ in model.named_parameters()] == [n for n in names if n not in useless]
    assert not useless & model.state_dict().keys()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(expected, outputs(other, images))
    backward(model.train(), images)
    assert without_gradient(model) == set()


@pytest.mark.parametrize('operation', ['efficient', 'eamlp'])
def test_after_other_attentions(operation: str) -> None:
    model, images = swapped(SWIN, operation), SWIN.images()
    expected, before = outputs(model, images), sum(p.numel() for p in model.parameters())
    sem_timm.drop_unread_parameters(model)
    assert_equal(expected, outputs(model, images))
    assert sum(p.numel() for p in model.parameters()) < before


def test_a_model_without_unread_parameters_has_the_keys_of_its_weights() -> None:
    model, other = (sem_timm.drop_unread_parameters(swapped(SWIN)) for _ in range(2))
    nn.init.normal_(model.layers[0].blocks[0].attn.core.mk)
    other.load_state_dict(model.state_dict())
    assert_equal(outputs(model, SWIN.images()), outputs(other, SWIN.images()))


def test_there_is_no_undo() -> None:
    model = sem_timm.drop_unread_parameters(swapped(SWIN))
    for each in (model, copy.deepcopy(model)):
        with refused(each, ModelError, 'drop_unread_parameters', 'layers.0.blocks.0.attn', 'undo'):
            sem_timm.unpatch_model(each)


def test_packed_projections_keep_their_rows() -> None:
    model, images = VIT.create(), VIT.images()
    plan = sem_timm.plan_model(model, 'external')
    swap(model, plan)
    expected, weights = outputs(model, images), dict(model.named_parameters())
    sem_timm.drop_unread_parameters(model)
    assert plan.sliced and all(model.get_parameter(name) is weights[name] for name in plan.sliced)
    assert_equal(expected, outputs(model, images))


def test_parameters_that_were_frozen_before_the_swap_are_dropped_too() -> None:
    model = SWIN.create().requires_grad_(False)
    plan = sem_timm.plan_model(model, 'external', input_size=SWIN.input_size)
    swap(model, plan)
    sem_timm.drop_unread_parameters(model)
    assert plan.unread and not set(plan.unread) & {name for name, _ in model.named_parameters()}


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(ModelError, match='DataParallel'):
        sem_timm.drop_unread_parameters(nn.DataParallel(swapped(SWIN)))


def test_models_of_which_no_attention_was_swapped() -> None:
    for model in (SWIN.create(), FAMILIES['resnet'].create(), sem_timm.patch_model(FAMILIES['resnet'].create())):
        with refused(model, ModelError, type(model).__name__, 'there is nothing to drop'):
            sem_timm.drop_unread_parameters(model)


def test_a_model_without_unread_parameters_can_be_moved_and_cast() -> None:
    model = sem_timm.drop_unread_parameters(swapped(SWIN)).to(torch.bfloat16)
    (found,) = outputs(model, SWIN.images().bfloat16())
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert sem_timm.patched_modules(model)
