"""Costs against known figures and against what a real training forward keeps."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.errors import ModelError, OptionError
from tests.families import FAMILIES
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.thorough import first_of_each

pytestmark = pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a real training forward keeps beside parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(images)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ('name', 'operation'),
    first_of_each(
        [
            ('resnet', 'sem'),
            ('convnext', 'sem'),
            ('efficientnet', 'timm_cbam'),
            ('vit_registers', 'external'),
            ('swin', 'eamlp'),
        ],
        count=4,
    ),
)
def test_activations_are_those_of_a_real_training_forward(name: str, operation: str) -> None:
    family = FAMILIES[name]
    base = family.create(drop_path_rate=0.0)
    model = sem_timm.patch_model(copy.deepcopy(base), operation, input_size=family.input_size)
    found = sem_timm.summary(model, family.input_size)
    assert found.is_patched
    for cost, real in ((found.base, base), (found.patched, model)):
        # In whole bytes, but for a byte lost per stage where the batch of two is halved.
        assert cost.activation_bytes == pytest.approx(kept_bytes(real, family.images()) / 2, abs=len(found.stages))
        assert cost.parameters == sum(parameter.numel() for parameter in real.parameters())


def test_figures_of_resnet50_are_the_known_ones() -> None:
    with torch.device('meta'):
        found = sem_timm.summary(timm.create_model('resnet50'))
    assert not found.is_patched and found.base == found.patched
    assert found.base.parameters == 25_557_032
    assert found.base.macs == 4_089_184_256  # 4.09 G, as everywhere
    assert [stage.name for stage in found.stages][-5:] == ['layer1', 'layer2', 'layer3', 'layer4', 'fc']


def test_attention_counts_pairs_of_tokens_only_in_the_base() -> None:
    model = sem_timm.patch_model(timm.create_model('test_vit', img_size=160, num_classes=10), 'external', memory=8)
    small, large = (sem_timm.summary(resized(model, size), (3, size, size)) for size in (160, 320))
    by_size = [next(stage for stage in one.stages if stage.name == 'blocks.0') for one in (small, large)]
    ratio = 401 / 101  # tokens with the class token
    assert by_size[1].base.macs / by_size[0].base.macs > 1.05 * ratio
    assert by_size[1].patched.macs / by_size[0].patched.macs == pytest.approx(ratio, rel=1e-3)
    # Fused kernels keep no table of pairs, so that neither side's memory is quadratic.
    assert by_size[1].base.activation_bytes / by_size[0].base.activation_bytes == pytest.approx(ratio, rel=1e-2)


def resized(model: Any, size: int) -> nn.Module:
    other = copy.deepcopy(model)
    other.set_input_size((size, size))
    return other


@pytest.mark.parametrize('name', first_of_each(['efficientnet', 'maxvit', 'nfnet', 'vgg', 'deit_distilled']))
def test_parts_add_up_to_the_whole(name: str) -> None:
    family = FAMILIES[name]
    model = sem_timm.patch_model(family.create(), 'sem', input_size=family.input_size)
    found = sem_timm.summary(model, family.input_size)
    assert found.patched.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len({stage.name for stage in found.stages}) == len(found.stages)
    assert found.patched.macs > found.base.macs > 0
    known = {module for module, _ in model.named_modules()} | {'(model)'}
    assert {stage.name for stage in found.stages} <= known
    for stage in found.stages:  # SEM only adds
        assert stage.patched.parameters >= stage.base.parameters


def test_inference_mode_around_it_changes_nothing() -> None:
    model = sem_timm.patch_model(timm.create_model('test_resnet'))
    expected = sem_timm.summary(model)
    with torch.inference_mode():
        assert sem_timm.summary(model) == expected


def test_frozen_parameters_keep_fewer_activations() -> None:
    model = sem_timm.patch_model(timm.create_model('test_resnet'))
    every = sem_timm.summary(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_parameter('layer4.0.sem.decision.weight').requires_grad_(True)
    frozen = sem_timm.summary(model)
    assert 0 < frozen.patched.activation_bytes < every.patched.activation_bytes
    assert {s.name for s in frozen.stages if s.patched.activation_bytes} <= {'layer4', 'global_pool', 'fc'}


@pytest.mark.parametrize('checkpointing', [False, True])
def test_model_stays_as_it_is(checkpointing: bool) -> None:
    model: Any = sem_timm.patch_model(FAMILIES['vit_registers'].create(), 'external').train()
    expected = repr(sem_timm.summary(model))
    model.set_grad_checkpointing(checkpointing)
    before = snapshot(model)
    assert repr(sem_timm.summary(model)) == expected
    assert_same(before, snapshot(model))


def test_parameters_that_are_no_longer_read_are_counted() -> None:
    model = sem_timm.patch_model(FAMILIES['swin'].create(), 'external', input_size=(3, 64, 64))
    found = sem_timm.summary(model, (3, 64, 64))
    count = sum(p.numel() for p in model.parameters())
    assert found.unread_parameters > 0 and f'{found.unread_parameters:,} parameters are no longer read' in repr(found)
    sem_timm.drop_unread_parameters(model)
    assert count - sum(p.numel() for p in model.parameters()) == found.unread_parameters
    with refused(model, ModelError, 'what SwinTransformer was before', 'drop_unread_parameters'):
        sem_timm.summary(model, (3, 64, 64))


def test_table_and_data_say_the_same() -> None:
    found = sem_timm.summary(sem_timm.patch_model(timm.create_model('test_resnet')))
    lines = repr(found).splitlines()
    assert lines[0].split() == ['stage', 'parameters', 'patched', 'MACs', 'patched', 'activations', 'patched']
    assert [line.split()[0] for line in lines[2 : 2 + len(found.stages)]] == [stage.name for stage in found.stages]
    data = json.loads(json.dumps(found.to_dict()))
    assert data['base']['macs'] == found.base.macs == sum(stage['base']['macs'] for stage in data['stages'])
    assert f'{found.patched.parameters:,}' in lines[3 + len(found.stages)]
    plain = repr(sem_timm.summary(timm.create_model('test_resnet')))
    assert 'patched' not in plain.lower()


def test_what_cannot_be_measured_is_refused() -> None:
    model = timm.create_model('test_vit')
    with refused(model, OptionError, 'input_size=(3, 7, 7)'):
        sem_timm.summary(model, (3, 7, 7))

    class Printing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError('it is never trained')
            return self.fc(x)

    printing = Printing()
    with refused(printing, ModelError, 'in training mode', 'it is never trained'):
        sem_timm.summary(printing, (4,))
