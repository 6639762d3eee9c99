"""Gates in the weights: exact where they are constants, as wrong as is said where not, and timm's network after it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.layers import ChannelGate
from tests.families import FAMILIES, Family
from tests.folding.constant_gates import gated, gates_of, make_constant
from tests.thorough import first_of_each
from tests.versions import save_for_hf

SWIN_V2 = Family(
    'swinv2_tiny_window8_256',
    options={'img_size': 64, 'window_size': 4, 'embed_dim': 24, 'depths': (2, 2), 'num_heads': (3, 6)},
)
SCALED_VIT = Family('test_vit', options={'img_size': 64, 'init_values': 1e-5})
# What the means go into; all gates of these are folded.
KINDS: dict[str, tuple[Family, str]] = {
    'resnet': (FAMILIES['resnet'], 'batch norm'),
    'regnet': (FAMILIES['regnet'], 'batch norm'),
    'convnext': (FAMILIES['convnext'], 'layer scale'),
    'vit_registers': (FAMILIES['vit_registers'], 'linear layer'),
    'scaled_vit': (SCALED_VIT, 'layer scale'),
    'swin_v2': (SWIN_V2, 'layer norm'),
    'resnetv2': (FAMILIES['resnetv2'], 'convolution'),
    'mixer': (FAMILIES['mixer'], 'linear layer'),
    'swin': (FAMILIES['swin'], 'linear layer'),
    'mobilenetv4': (FAMILIES['mobilenetv4'], 'batch norm'),
    'maxvit': (FAMILIES['maxvit'], 'linear layer'),
    'coatnet': (FAMILIES['coatnet'], 'convolution'),
    'levit': (FAMILIES['levit'], 'batch norm'),
    'mvitv2': (FAMILIES['mvitv2'], 'linear layer'),
    'hrnet': (FAMILIES['hrnet'], 'batch norm'),
    'xcit': (FAMILIES['xcit'], 'layer scale'),
}
# All kinds of layers in every run, and what else there is in the thorough one.
CELLS = first_of_each([(name, kind) for name, (_, kind) in KINDS.items()], lambda name, kind: kind)
NAMES = first_of_each(KINDS, lambda name: KINDS[name][1])


def base_of(family: Family) -> nn.Module:
    return timm.create_model(family.architecture, **{'num_classes': 10, **family.options}).eval()


def assert_is_timms(model: nn.Module, family: Family) -> nn.Module:
    """That nothing of this package is in a model; the one of timm that has its weights."""
    base = base_of(family)
    assert list(model.state_dict()) == list(base.state_dict())
    base.load_state_dict(model.state_dict(), strict=True)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    assert not [key for module in model.modules() for key in vars(module) if key.startswith('_surgery')]
    assert b'sem_timm' not in pickle.dumps(model)
    return base


@pytest.mark.parametrize(('name', 'kind'), CELLS)
def test_gates_that_are_constants_fold_up_to_rounding(name: str, kind: str) -> None:
    family, images = KINDS[name][0], KINDS[name][0].images(3)
    model = make_constant(gated(family.create(), 'ie', init='paper', input_size=family.input_size))
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        found = model(images)
        base = assert_is_timms(model, family)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert torch.equal(base(images), found)
        unscaled = family.create()(images)
    # What is left is rounding, next to what the gates do at all.
    assert 0 <= float((found - expected).norm()) < 0.01 * float((unscaled - expected).norm())
    assert result.is_plain and result.num_folded == len(result.gates)
    assert kind in {row.kind for row in result.gates}
    # A mean over images of one and the same number is that number but for the last bit.
    assert all(row.loss < 1e-6 and row.explained < 1e-6 for row in result.gates)  # type: ignore[operator]


@pytest.mark.parametrize('name', NAMES)
def test_gates_that_are_one_leave_weights_and_outputs_as_they_are(name: str) -> None:
    family, images = KINDS[name][0], KINDS[name][0].images(2)
    model = sem_timm.patch_model(family.create(), 'sem', input_size=family.input_size)
    base = family.create()
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        assert torch.equal(model(images), expected)
    assert {(row.mean, row.loss, row.explained) for row in result.gates} == {(1.0, 0.0, 0.0)}
    for key, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert_is_timms(model, family)


class Told:
    """What a gate was given, and by what it multiplied."""

    def __init__(self, gate: ChannelGate) -> None:
        self.branches: list[Tensor] = []
        self.vectors: list[Tensor] = []
        self.axis = gate.channel_dim
        gate.register_forward_pre_hook(self.look)

    def look(self, gate: Any, args: Any) -> None:
        self.branches.append(args[0].movedim(self.axis, 1).flatten(2).double())
        self.vectors.append(gate.gate(args[0]).double())

    def loss(self) -> float:
        branch, vector = torch.cat(self.branches), torch.cat(self.vectors)
        gated, constant = branch * vector[..., None], branch * vector.mean(0)[:, None]
        return float((gated - constant).norm() / gated.norm())

    def explained(self) -> float:
        vector = torch.cat(self.vectors)
        return float(vector.var(0, correction=0).mean() / vector.var(correction=0))


@pytest.mark.parametrize('name', NAMES)
def test_loss_and_variance_are_those_of_all_images_at_once(name: str) -> None:
    family = KINDS[name][0]
    model = gated(family.create(), 'sem', init='paper', input_size=family.input_size)
    batches = [family.images(3), family.images(2) + 1]
    twin = copy.deepcopy(model)
    told = {gate: Told(module) for gate, module in gates_of(twin).items()}
    with torch.no_grad():
        for images in batches:
            twin(images)
    result = sem_timm.fold_gates(model, batches)
    assert result.num_images == 5 and result.num_folded == len(result.gates) == len(told)
    for row in result.gates:
        vectors = torch.cat(told[row.name].vectors)
        assert row.mean == pytest.approx(float(vectors.mean()), rel=1e-5)
        assert row.explained == pytest.approx(told[row.name].explained(), rel=1e-4)
        assert row.loss == pytest.approx(told[row.name].loss(), rel=1e-4)  # sums of squares in float32
        assert row.loss and row.loss > 0


def test_weights_hold_the_mean_of_each_channel() -> None:
    family = FAMILIES['resnet']
    model: Any = gated(family.create(), 'sem', init='paper', input_size=family.input_size)
    twin = copy.deepcopy(model)
    told = Told(twin.layer2[0].sem)
    with torch.no_grad():
        twin(family.images(4))
    sem_timm.fold_gates(model, family.images(4))
    mean = torch.cat(told.vectors).mean(0)
    for new, old in (
        (model.layer2[0].bn2.weight, twin.layer2[0].bn2.weight),
        (model.layer2[0].bn2.bias, twin.layer2[0].bn2.bias),
    ):
        torch.testing.assert_close(new.double(), old.double() * mean, rtol=1e-6, atol=1e-8)


def test_max_loss_folds_what_is_below_and_leaves_the_rest() -> None:
    family = FAMILIES['resnet']
    model = gated(family.create(), 'sem', init='paper', input_size=family.input_size)
    images = family.images(4)
    losses = sorted(row.loss for row in sem_timm.fold_gates(copy.deepcopy(model), images).gates)  # type: ignore[type-var]
    bound = losses[1]
    assert bound is not None
    result = sem_timm.fold_gates(model, images, max_loss=bound)
    folded = {row.module for row in result.gates if row.folded}
    assert len(folded) == 2 and not result.is_plain
    assert {part.name for part in sem_timm.patched_modules(model)} == {row.module for row in result.gates} - folded
    assert all(f'above max_loss={bound:g}' in row.reason for row in result.gates if not row.folded)
    assert sem_timm.fold_gates(model, images).is_plain  # what was left can be folded later
    assert_is_timms(model, family)


def test_a_folded_gate_beside_one_that_stays_is_an_identity() -> None:
    family = FAMILIES['vit_registers']
    model = gated(family.create(), 'ie', init='paper', branches='all', input_size=family.input_size)
    images = family.images(3)
    for name, gate in gates_of(model).items():
        if name.endswith('ie1'):
            make_constant(gate)
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images, max_loss=1e-6)
        assert {row.attribute for row in result.gates if row.folded} == {'ie1'}
        assert len(sem_timm.patched_modules(model)) == len(result.gates) / 2
        first = [gate for name, gate in gates_of(model).items() if name.endswith('ie1')]
        assert len(first) == 6
        assert all(bool((gate.gate(torch.randn(2, 9, gate.channels)) == 1).all()) for gate in first)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert sem_timm.fold_gates(model, images).is_plain
    assert_is_timms(model, family)


def test_modes_flags_hooks_and_random_numbers_stay() -> None:
    family = FAMILIES['resnet']
    model: Any = gated(family.create(), 'sem', init='paper', input_size=family.input_size).train()
    model.layer1.eval()
    model.conv1[0].weight.requires_grad_(False)
    calls: list[Any] = []
    model.layer3.register_forward_hook(lambda *args: calls.append(args))
    known = {name: parameter for name, parameter in model.named_parameters() if '.sem.' not in name}
    flags = {name: parameter.requires_grad for name, parameter in known.items()}
    modes = {name: module.training for name, module in model.named_modules() if '.sem' not in name}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if '.sem.' not in name}
    state = torch.get_rng_state()
    assert sem_timm.fold_gates(model, family.images(4)).is_plain
    assert torch.equal(torch.get_rng_state(), state) and not calls
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(known[name] is parameter for name, parameter in model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_variant_is_its_base_then(tmp_path: Any) -> None:
    model: Any = timm.create_model('test_resnet_sem', num_classes=10, sem_reduction=8).eval()
    assert sem_timm.fold_gates(model, torch.randn(4, 3, 64, 64)).is_plain
    assert_is_timms(model, Family('test_resnet'))
    save_for_hf(model, tmp_path)
    assert '_sem' not in (tmp_path / 'config.json').read_text()
    loaded: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert type(loaded.layer1[0]) is type(model.layer1[0]) and torch.equal(loaded(images), model(images))


def test_accuracy_is_that_of_the_images_before_and_after() -> None:
    family = FAMILIES['resnet']
    model = gated(family.create(), 'sem', init='paper', input_size=family.input_size)
    images = family.images(8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    result = sem_timm.fold_gates(model, list(zip(images.split(3), labels.split(3))))
    with torch.no_grad():
        after = 100 * float((model(images).argmax(1) == labels).double().mean())
    assert (result.accuracy_before, result.accuracy_after) == (87.5, pytest.approx(after))
    assert f'Top-1 accuracy: 87.50 % before, {after:.2f} % after.' in str(result)
    assert result.to_dict()['accuracy_before'] == 87.5


def test_half_precision_folds_in_its_own_type() -> None:
    family = FAMILIES['resnet']
    model = make_constant(gated(family.create(), 'ie', init='paper', input_size=family.input_size)).bfloat16()
    images = family.images(3)
    with torch.no_grad():
        expected = model(images.bfloat16())
        assert sem_timm.fold_gates(model, images).is_plain
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        scale = float(expected.abs().max())
        torch.testing.assert_close(model(images.bfloat16()), expected, rtol=0, atol=0.05 * scale)  # 8 bits


def test_gates_on_outputs_fold_into_what_comes_before_their_block() -> None:
    family = FAMILIES['vgg']
    model = make_constant(gated(family.create(), 'ie', init='paper', input_size=family.input_size))
    images = family.images(2)
    with torch.no_grad():
        expected = model(images)
        result = sem_timm.fold_gates(model, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    rows = {row.module: row for row in result.gates}
    assert rows['features.2'].layers == ('features.1',) and rows['features.2'].folded
    assert not rows['features.28'].folded


def test_backbones_of_features_fold_too() -> None:
    options: dict[str, Any] = {'features_only': True, 'sem_init': 'identity'}
    model = timm.create_model('test_resnet_sem', **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert sem_timm.fold_gates(model, images).is_plain
        assert all(torch.equal(one, other) for one, other in zip(model(images), expected))
    base = timm.create_model('test_resnet', features_only=True)
    base.load_state_dict(model.state_dict(), strict=True)
