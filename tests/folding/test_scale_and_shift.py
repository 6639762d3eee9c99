"""A scale and a shift per channel in the weights: nothing is lost, and what has no bias says so."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import sem_timm
from sem_timm.errors import ModelError
from tests.families import FAMILIES, Family
from tests.folding.test_fold import assert_is_timms
from tests.refusals import refused
from tests.thorough import first_of_each
from tests.twins import trained

# What they go into, in blocks and behind each norm and linear layer; in all of these each has its place.
CELLS: list[tuple[str, str, dict[str, Any]]] = [
    ('resnet', 'batch norm', {}),
    ('resnet', 'batch norm', {'position': 'output', 'target': nn.BatchNorm2d}),
    ('efficientnet', 'batch norm', {'position': 'output', 'target': r'(.*\.)?bn\d\.drop'}),  # before the activation
    ('vit_registers', 'linear layer', {'branches': 'all'}),
    ('vit_registers', 'layer norm', {'position': 'output', 'target': nn.LayerNorm}),  # of timm, which no trace reads
    ('vit_registers', 'linear layer', {'position': 'output', 'target': r'blocks\..*\.(qkv|proj|fc1|fc2)'}),
    ('swin', 'layer norm', {'position': 'output', 'target': nn.LayerNorm}),
    ('convnext', 'layer norm', {'position': 'output', 'target': nn.LayerNorm}),
]


def adapted(family: Family, **options: Any) -> nn.Module:
    """A model with trained scales and shifts."""
    return trained(sem_timm.patch_model(family.create(), 'ssf', input_size=family.input_size, **options)).eval()


@pytest.mark.parametrize(('name', 'kind', 'options'), first_of_each(CELLS, lambda name, kind, options: kind))
def test_they_fold_up_to_rounding(name: str, kind: str, options: dict[str, Any]) -> None:
    family = FAMILIES[name]
    images, model = family.images(3), adapted(family, **options)
    with torch.no_grad():
        expected, plain = model(images), family.create()(images)
        result = sem_timm.fold_gates(model, images, max_loss=0)
        found = model(images)
        assert torch.equal(assert_is_timms(model, family)(images), found)
    # What is left is rounding, next to what they do at all.
    assert 0 <= float((found - expected).norm()) < 1e-4 * float((expected - plain).norm())
    assert result.is_plain and result.num_folded == len(result.gates) > 0
    assert {row.kind for row in result.gates} == {kind}
    assert {(row.loss, row.explained) for row in result.gates} == {(0.0, 0.0)}


@pytest.mark.parametrize('name', first_of_each(['resnet', 'vit_registers', 'convnext', 'vgg']))
def test_untrained_ones_leave_weights_as_they_are(name: str) -> None:
    family = FAMILIES[name]
    model = sem_timm.patch_model(family.create(), 'ssf', input_size=family.input_size)
    result = sem_timm.fold_gates(model, family.images(2))
    state = family.create().state_dict()
    assert result.num_folded == sum(not row.reason for row in result.gates) > 0
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if key in state)


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('convnext', 'stages.0.blocks.0.gamma is a layer scale, without a bias'),
        ('resnetv2', 'stages.0.blocks.0.conv2 is a convolution, without a bias'),
        ('vgg', 'features.1 is a batch norm, what stands behind passes a factor on and no shift'),  # a relu
    ],
)
def test_a_shift_without_a_place_is_told_and_scales_alone_have_one(name: str, why: str) -> None:
    family = FAMILIES[name]
    images, model = family.images(2), adapted(family)
    result = sem_timm.fold_gates(copy.deepcopy(model), images)
    assert not result.gates[0].folded
    assert result.gates[0].reason == f'its shift has no place: {why}'
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, sem_timm.layers.ScaleAndShift):
                module.scale.abs_()
                module.shift.zero_()
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        scale = float(expected.abs().max())
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * scale)
    assert result.gates[0].folded


def test_a_relu_passes_no_negative_scale_on() -> None:
    family = FAMILIES['vgg']
    images, blank = family.images(2), torch.zeros(1, *family.input_size)  # of which little can be seen
    model = sem_timm.patch_model(family.create(), 'ssf', input_size=family.input_size)
    with torch.no_grad():
        gates: Any = [module for module in model.modules() if isinstance(module, sem_timm.layers.ScaleAndShift)]
        gates[0].scale[:3] = -0.5
        gates[1].scale.fill_(0.7)
        expected = model(images)
        result = sem_timm.fold_gates(model, blank)
        assert result.gates[0].reason == 'in the weights of features.1 it gives other numbers'
        assert result.gates[1].folded
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_behind_an_activation_they_stay() -> None:
    model = timm.create_model('tf_efficientnet_lite0', num_classes=10).eval()
    trained(sem_timm.patch_model(model, 'ssf', position='output', target=BatchNormAct2d, input_size=(3, 64, 64)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    norms: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)
    }
    linear = {name for name, norm in norms.items() if isinstance(norm.act, nn.Identity)}
    assert {row.module for row in result.gates if row.folded} == linear and len(linear) == 16
    assert {row.module for row in result.gates} == set(norms)


def test_one_around_another_folds_after_it() -> None:
    family = FAMILIES['resnet']
    images, model = family.images(2), adapted(family, position='output', target=nn.BatchNorm2d)
    trained(sem_timm.patch_model(model, 'ssf', input_size=family.input_size))
    with torch.no_grad():
        expected = model(images)
        first = sem_timm.fold_gates(model, images)
        reasons = {row.module: row.reason for row in first.gates if not row.folded}
        assert reasons['layer1.0'] == (
            'there is no layer to fold it into: layer1.0.bn2 has a module inserted itself'
        ) and set(reasons) == {'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0'}
        assert sem_timm.fold_gates(model, images).is_plain
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert_is_timms(model, family)


def test_a_folded_one_beside_one_that_stays_is_an_identity() -> None:
    family = FAMILIES['vit_registers']
    images, model = family.images(2), adapted(family, branches='all')
    hook = model.get_submodule('blocks.0.mlp.fc2').register_forward_hook(lambda *args: None)
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        hook.remove()
    assert [row.name for row in result.gates if not row.folded] == ['blocks.0.ssf2']
    beside: Any = model.get_submodule('blocks.0.ssf1')
    assert bool((beside.scale == 1).all()) and not beside.shift.any()
    assert sem_timm.fold_gates(model, images).is_plain
    assert_is_timms(model, family)


@pytest.mark.parametrize('where', ['shift', 'weights', 'images'])
def test_numbers_that_are_not_finite_are_refused(where: str) -> None:
    family = FAMILIES['resnet']
    images, model = family.images(), adapted(family)
    with torch.no_grad():
        numbers = images if where == 'images' else model.get_parameter('layer1.0.ssf.shift')
        numbers = model.get_parameter('layer1.0.bn2.weight') if where == 'weights' else numbers
        numbers.view(-1)[0] = math.inf
    with refused(model, ModelError, 'gives numbers that are not finite; weights or images are not'):
        sem_timm.fold_gates(model, images)


def test_one_with_a_hook_stays() -> None:
    family = FAMILIES['resnet']
    model: Any = adapted(family)
    model.layer1[0].ssf.register_forward_hook(lambda module, args, output: 3 * output)
    images = family.images(2)
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert {row.module: row.reason for row in result.gates if not row.folded} == {
        'layer1.0': 'there is no layer to fold it into: layer1.0.ssf has hooks, or a forward of its own'
    }
