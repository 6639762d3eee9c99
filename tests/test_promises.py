"""The promises of the package, each with a test that fails when it is broken, on every family it applies to."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import FAMILIES, Family
from tests.outputs import outputs
from tests.snapshot import assert_same, snapshot
from tests.versions import save_for_hf, unless_timm_fails


def assert_bit_identical(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert torch.equal(one, other), (one - other).abs().max()


@dataclass(frozen=True)
class Twins:
    """A model of a family and what SEM made of it, made once for all promises, which leave both as they are."""

    family: Family
    base: Any
    plan: sem_timm.Plan
    patched: Any

    def images(self, batch_size: int = 2, size: int | None = None) -> Tensor:
        return self.family.images(batch_size, size)


@pytest.fixture(scope='module', params=list(FAMILIES))
def twins(request: pytest.FixtureRequest) -> Twins:
    """Each family in turn."""
    family = FAMILIES[request.param]
    base = family.create()
    model = copy.deepcopy(base).train()
    before = snapshot(model)
    plan = sem_timm.plan_model(model, input_size=family.input_size)
    assert_same(before, snapshot(model))  # the first half of promise 10
    return Twins(family, base, plan, sem_timm.patch_model(model.eval(), plan))


class FailsOnTheThird(nn.Identity):
    """A module that cannot be built a third time on a real device."""

    built = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        if torch.empty(0).device.type != 'meta':
            FailsOnTheThird.built += 1
            torch.rand(3)
            if FailsOnTheThird.built % 3 == 0:
                raise RuntimeError('out of memory, say')


def test_1_nothing_is_touched_unless_all_of_it_works() -> None:
    model = FAMILIES['resnet'].create()
    FailsOnTheThird.built = 0
    before = snapshot(model)
    with pytest.raises(RuntimeError, match='out of memory'):
        sem_timm.patch_model(model, FailsOnTheThird)
    assert_same(before, snapshot(model))


def test_2_base_keys_never_change(twins: Twins) -> None:
    before, after = twins.base.state_dict(), twins.patched.state_dict()
    assert list(before) == [name for name in after if name in before]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    blocks = {site.name for site in sem_timm.patched_modules(twins.patched)}
    assert all(name.split('.sem', 1)[0] in blocks for name in after.keys() - before.keys())


def test_3_the_class_survives(twins: Twins) -> None:
    model, images = copy.deepcopy(twins.patched), twins.images()
    classes = {name: type(module) for name, module in twins.base.named_modules()}
    for name, module in model.named_modules():
        assert isinstance(module, classes.get(name, type(module)))
    for site in sem_timm.patched_modules(model):
        assert type(model.get_submodule(site.name)).__mro__[1] is classes[site.name]
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    unless_timm_fails(lambda: copy.deepcopy(twins.base).reset_classifier(7))
    model.reset_classifier(7)
    assert outputs(model, images)[0].shape[-1] == 7


def test_4_insertions_start_as_an_exact_identity_and_learn_from_the_first_step(twins: Twins) -> None:
    model, images = copy.deepcopy(twins.patched), twins.images()
    assert_bit_identical(outputs(twins.base, images), outputs(model, images))
    model(images).square().mean().backward()
    for module in sem_timm.patched_modules(model):
        for child in module.inserted:
            operators = model.get_submodule(f'{module.name}.{child}').operators
            # Of SE's last layer the bias: the few hidden units of a narrow block may all be off for two images.
            last = (operators.se.fc2.bias, operators.eca.conv.weight, operators.ie.gamma, operators.ie.beta)
            assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in last), module.name


def test_4_in_training_mode_too(twins: Twins) -> None:
    found = []
    for model in (twins.base, twins.patched):
        torch.manual_seed(3)
        found.append(outputs(copy.deepcopy(model).train(), twins.images(4)))
    assert_bit_identical(*found)


def test_5_undo_is_exact(twins: Twins) -> None:
    model = copy.deepcopy(twins.base)
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    next(model.children()).register_forward_hook(lambda *_: None)
    before = snapshot(model)
    sem_timm.patch_model(model, input_size=twins.family.input_size)
    assert sem_timm.patched_modules(model)
    sem_timm.unpatch_model(model)
    assert_same(before, snapshot(model), random_state=False)


def test_6_shapes_stay_symbolic(twins: Twins) -> None:
    family = twins.family
    for batch_size, size in ((1, family.size), (3, family.other_size or family.size)):
        images = twins.images(batch_size, size)
        assert_bit_identical(outputs(twins.base, images), outputs(twins.patched, images))


def test_7_refusal_is_an_answer() -> None:
    model = FAMILIES['vit_registers'].create()
    plan = sem_timm.plan_model(model, 'sem', target=r'blocks\.\d+|fc_norm|head')
    assert {site.name for site in plan} == {f'blocks.{n}' for n in range(len(model.blocks))}
    with pytest.raises(sem_timm.RefusedError, match='no positions to pool over'):
        sem_timm.plan_model(model, 'sem', target='head')


def test_8_errors_teach() -> None:
    model = FAMILIES['resnet'].create()
    with pytest.raises(sem_timm.NoMatchError) as caught:
        sem_timm.plan_model(model, 'sem', target=r'layer5\..*')
    message = str(caught.value)
    assert "target 'layer5" in message and 'layer4' in message and 'plan_model(model)' in message


def test_9_no_code_from_files(tmp_path: Any) -> None:
    model = timm.create_model('test_resnet_sem', num_classes=10)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert model.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    text = (tmp_path / 'config.json').read_text()
    assert 'def forward' not in text and 'self.' not in text
    config = json.loads(text)
    plain = json.dumps(config)
    assert 'sem' in plain
    (tmp_path / 'config.json').write_text(plain.replace('"se"', '"os.system"'))
    if '"se"' in plain:
        with pytest.raises(sem_timm.OptionError, match=r'os\.system'):
            timm.create_model(f'local-dir:{tmp_path}')


def test_10_planning_is_pure(twins: Twins) -> None:
    """It changed nothing when the twins were made, and needs no weights."""
    weightless = copy.deepcopy(twins.base).to('meta')
    assert [*sem_timm.plan_model(weightless, input_size=twins.family.input_size)] == [*twins.plan]
