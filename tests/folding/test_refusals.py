"""What is not folded, and why; errors that leave the model as it was."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sem_timm
from sem_timm.errors import ModelError, OptionError
from sem_timm.folding import fold
from sem_timm.surgery import FactorPlace, factor_places
from tests.families import FAMILIES
from tests.folding.constant_gates import gated
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot

RESNET = FAMILIES['resnet']


def resnet(operation: Any = 'sem', **options: Any) -> Any:
    return gated(RESNET.create(), operation, init='paper', input_size=RESNET.input_size, **options)


def generator_of(images: Tensor) -> Any:
    yield images, torch.zeros(len(images), dtype=torch.long)


@pytest.mark.parametrize(
    ('options', 'loader', 'part'),
    [
        ({'max_loss': -0.1}, 'images', 'max_loss=-0.1: it is a relative error of 0 or more'),
        ({'max_loss': math.nan}, 'images', 'max_loss=nan: it is a relative error'),
        ({'max_loss': '0.1'}, 'images', "max_loss='0.1': it is a relative error"),
        ({'max_batches': 0}, 'images', 'max_batches'),
        ({'device': 'nowhere'}, 'images', "device='nowhere' is no device"),
        ({}, [], 'the loader yields no images; folding needs some'),
        ({}, 'generator', 'yields 0 images when passed over again, and yielded 2 before'),
        ({}, 'soft', 'accuracy needs whole numbers (B,)'),
        ({}, 'some', 'labels with some batches and none with others'),
        ({}, 'grey', 'takes images (C, H, W)'),
    ],
    ids=str,
)
def test_bad_input_is_told_and_nothing_is_done(options: Any, loader: Any, part: str) -> None:
    images = RESNET.images(2)
    loaders = {
        'images': images,
        'generator': generator_of(images),
        'soft': [(images, torch.rand(2, 10))],
        'some': [(images, torch.tensor([1, 2])), images],
        'grey': images[:, :1],
    }
    model = resnet()
    given = loaders[loader] if isinstance(loader, str) else loader
    with refused(model, OptionError, part):
        sem_timm.fold_gates(model, given, **options)


def test_models_without_gates_are_told_how_to_get_some() -> None:
    model = RESNET.create()
    with refused(model, ModelError, 'has no gates that patch_model put in', "sem_timm.patch_model(model, 'sem')"):
        sem_timm.fold_gates(model, RESNET.images())
    sem_timm.patch_model(model, 'timm_cbam', input_size=(3, 128, 128))
    with refused(model, ModelError, 'It has timm_cbam, which multiply by no gate per channel'):
        sem_timm.fold_gates(model, RESNET.images(size=128))
    wrapped = nn.DataParallel(resnet())
    with refused(wrapped, ModelError, 'is wrapped in DataParallel'):
        sem_timm.fold_gates(wrapped, RESNET.images())
    meta = sem_timm.patch_model(timm.create_model('test_resnet').to('meta'))
    with pytest.raises(ModelError, match='on the meta device'):
        sem_timm.fold_gates(meta, RESNET.images())


def test_weights_that_are_not_finite_are_told() -> None:
    model = resnet()
    with torch.no_grad():
        model.layer1[0].bn2.weight[0] = math.inf
    with refused(model, ModelError, 'gives numbers that are not finite'):
        sem_timm.fold_gates(model, RESNET.images())


def test_other_modules_and_attention_stay_and_the_rest_is_folded() -> None:
    family = FAMILIES['vit_registers']
    model = family.create()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, 'external', target=['blocks.0.attn'], input_size=family.input_size)
        sem_timm.patch_model(model, 'eamlp', target=['blocks.1.attn'], input_size=family.input_size)
    sem_timm.patch_model(model, 'external2d', target=['blocks.2'], input_size=family.input_size)
    gates = ['blocks.0', 'blocks.1', 'blocks.3']
    gated(model, 'sem', init='paper', branches='all', target=gates, input_size=family.input_size)
    result = sem_timm.fold_gates(model, family.images())
    reasons = {row.name: row.reason for row in result.gates if not row.folded}
    assert reasons == {
        'blocks.0.attn.core': 'external took the place of self-attention, and is no factor',
        'blocks.1.attn.core': 'eamlp took the place of self-attention, and is no factor',
        'blocks.1.sem1': 'there is no layer to fold it into: blocks.1.attn has eamlp in place of its self-attention',
        'blocks.2.external2d': 'external2d is no gate per channel, whose mean could be folded',
    }
    assert [part.name for part in sem_timm.patched_modules(model)] == [
        *('blocks.0.attn', 'blocks.1', 'blocks.1.attn', 'blocks.2')
    ]
    assert not result.is_plain and result.num_folded == 5


def tie(model: Any) -> None:
    model.layer2[0].bn2.weight = model.layer1[0].bn2.weight


def parametrise(model: Any) -> None:
    parametrizations.weight_norm(model.layer1[0].bn2, 'weight', dim=0)


def hook(model: Any) -> None:
    model.layer1[0].bn2.register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(model: Any) -> None:
    model.layer1[0].bn2.forward = lambda x: x


class Twice(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((2, 3), keepdim=True)


def derive(model: Any) -> None:
    model.layer1[0].bn2.__class__ = Twice


def without_weights(model: Any) -> None:
    model.layer1[0].bn2 = nn.BatchNorm2d(32, affine=False)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (hook, 'layer1.0.bn2 has hooks, or a forward of its own'),
        (replace_forward, 'layer1.0.bn2 has hooks, or a forward of its own'),
        (parametrise, 'the weights of layer1.0.bn2 are parametrised'),
        (derive, 'layer1.0.bn2'),
        (without_weights, 'layer1.0.bn2 is a batch norm without weights'),
    ],
)
def test_a_layer_that_is_more_than_its_class_takes_no_factor(change: Any, reason: str) -> None:
    model = resnet()
    change(model)
    result = sem_timm.fold_gates(model, RESNET.images())
    rows = {row.module: row for row in result.gates}
    assert not rows['layer1.0'].folded and reason in rows['layer1.0'].reason
    assert all(row.folded for name, row in rows.items() if name != 'layer1.0')
    assert [part.name for part in sem_timm.patched_modules(model)] == ['layer1.0']


def test_a_shared_weight_takes_no_factor() -> None:
    model: Any = gated(timm.create_model('resnet18', num_classes=10), 'sem', init='paper')
    model.layer1[1].bn2.weight = model.layer1[0].bn2.weight
    result = sem_timm.fold_gates(model, torch.randn(2, 3, 64, 64))
    reasons = {row.module: row.reason for row in result.gates if not row.folded}
    assert reasons == {
        name: f'there is no layer to fold it into: {name}.bn2.weight is shared with another layer'
        for name in ('layer1.0', 'layer1.1')
    }


def test_an_attention_of_the_networks_own_behind_the_norm_sees_more_than_a_factor() -> None:
    model: Any = gated(timm.create_model('seresnet18', num_classes=10), 'sem', init='paper')
    result = sem_timm.fold_gates(model, torch.randn(2, 3, 64, 64))
    assert result.num_folded == 0 and len(sem_timm.patched_modules(model)) == 8
    assert 'the argument x in layer1.0.se is read by others as well' in result.gates[0].reason
    assert 'Still there:' in str(result)


def wrong_places(model: nn.Module) -> Any:
    for place in factor_places(model):
        if place.module == 'layer1.0':  # not bn2, but the norm before
            moved = [replace(one, name=one.name.replace('bn2', 'bn1')) for one in place.parameters]
            place = FactorPlace(place.module, place.attribute, tuple(moved))
        yield place


def test_a_place_that_is_wrong_is_found_out_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, 'factor_places', wrong_places)
    model = resnet()
    weight = model.layer1[0].bn1.weight.clone()
    result = sem_timm.fold_gates(model, RESNET.images())
    (row,) = [row for row in result.gates if not row.folded]
    assert row.reason == 'in the weights of layer1.0.bn1 it gives other numbers'
    assert torch.equal(model.layer1[0].bn1.weight, weight)


@pytest.mark.parametrize('name', ['_forget_variant', 'unpatch_modules'])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = timm.create_model('test_resnet_sem', num_classes=10).eval()
    before, original, calls = snapshot(model), getattr(fold, name), []

    def fail(of: nn.Module, *args: Any) -> None:
        original(of, *args)
        calls.append(of)
        if of is model:
            raise KeyboardInterrupt

    monkeypatch.setattr(fold, name, fail)
    with pytest.raises(KeyboardInterrupt):
        sem_timm.fold_gates(model, RESNET.images())
    assert calls[-1] is model
    assert_same(before, snapshot(model))


class Reader(nn.Module):
    """A network whose head reads a weight of a block."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * self.network.layer4[0].bn2.weight.sum()  # type: ignore[no-any-return]


def test_a_weight_that_others_read_is_found_out_on_the_whole_model() -> None:
    model = gated(Reader(RESNET.create()), 'sem', init='paper', input_size=RESNET.input_size)
    with refused(model, ModelError, 'gives other outputs than with constant gates', 'Nothing was folded'):
        sem_timm.fold_gates(model, RESNET.images())
