"""`disabled`: the base model for a while, and then exactly the patched one again."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import ModelError
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot
from tests.twins import trained

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    'sem': ('resnet', ('sem',)),
    'sem on outputs': ('densenet', ('sem',)),
    'external': ('vit_registers', ('external',)),
    'both': ('swin', ('external', 'sem')),
    'eamlp': ('vit_registers', ('eamlp',)),
}


def both(case: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A base model, its patched twin, and images."""
    name, operations = CASES[case]
    family = FAMILIES[name]
    model = family.create()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        for operation in operations:
            sem_timm.patch_model(twin, operation, input_size=family.input_size)
    return model, trained(twin), family.images()


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(images)
    return out


@pytest.mark.parametrize('case', CASES)
def test_disabled_runs_the_base_and_comes_back_exactly(case: str) -> None:
    base, model, images = both(case)
    patched = run(model, images)
    before, parts = snapshot(model), sem_timm.patched_modules(model)
    with sem_timm.disabled(model) as inside:
        assert inside is model
        assert sem_timm.patched_modules(model) == ()
        assert torch.equal(run(model, images), run(base, images))
        for name, module in base.named_modules():
            assert type(model.get_submodule(name)) is type(module)
    assert_same(before, snapshot(model))
    assert sem_timm.patched_modules(model) == parts
    assert torch.equal(run(model, images), patched) and not torch.equal(patched, run(base, images))


def test_blocks_can_be_nested_and_repeated() -> None:
    base, model, images = both('both')
    before, plain = snapshot(model), run(base, images)
    with sem_timm.disabled(model):
        with sem_timm.disabled(model):
            assert torch.equal(run(model, images), plain)
        with sem_timm.disabled(model.layers[0]):  # type: ignore[index]
            assert torch.equal(run(model, images), plain)
        assert torch.equal(run(model, images), plain)
    assert_same(before, snapshot(model))
    with sem_timm.disabled(model.layers[0]):  # type: ignore[index]
        assert not torch.equal(run(model, images), plain)
        with sem_timm.disabled(model):
            assert torch.equal(run(model, images), plain)
        assert not torch.equal(run(model, images), plain)
    assert_same(before, snapshot(model))


def test_it_ends_well_after_an_exception() -> None:
    _, model, _ = both('sem')
    before = snapshot(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), sem_timm.disabled(model), sem_timm.disabled(model):
            raise error
        assert_same(before, snapshot(model))


def test_no_surgery_while_it_is_disabled() -> None:
    _, model, _ = both('sem')
    before = snapshot(model)
    calls: list[Any] = [
        sem_timm.plan_model,
        sem_timm.patch_model,
        sem_timm.unpatch_model,
        sem_timm.drop_unread_parameters,
    ]
    with sem_timm.disabled(model):
        for call in calls:
            with pytest.raises(ModelError, match='leave its with block first'):
                call(model)
    assert_same(before, snapshot(model))


def test_copies_made_inside_are_of_the_base() -> None:
    base, model, images = both('external')
    with sem_timm.disabled(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for teacher in copies:
        assert torch.equal(run(teacher, images), run(base, images))
        assert list(teacher.state_dict()) == list(model.state_dict())
        sem_timm.plan_model(teacher, 'sem')


def test_training_inside_trains_the_base_alone() -> None:
    _, model, images = both('sem')
    with sem_timm.disabled(model):
        model.train()
        model(images).sum().backward()
    new = tuple(f'{part.name}.{child}.' for part in sem_timm.patched_modules(model) for child in part.inserted)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(new), name
    assert all(module.training for module in model.modules())


def test_compiled_models_can_be_disabled() -> None:
    base, model, images = both('sem')
    compiled: Any = torch.compile(model, backend='eager')
    patched = run(compiled, images)
    with sem_timm.disabled(compiled):
        assert torch.equal(run(compiled, images), run(base, images))
    assert torch.equal(run(compiled, images), patched)


def test_compiled_code_follows_undo_and_another_patch() -> None:
    base, model, images = both('sem')
    compiled: Any = torch.compile(model, backend='eager')
    patched = run(compiled, images)
    sem_timm.unpatch_model(model)
    assert torch.equal(run(compiled, images), run(base, images)) and not torch.equal(run(base, images), patched)
    trained(sem_timm.patch_model(model, 'eca'))
    assert torch.equal(run(compiled, images), run(model, images))
    assert not torch.equal(run(compiled, images), run(base, images))


def test_what_cannot_be_disabled() -> None:
    base, model, _ = both('both')
    sem_timm.drop_unread_parameters(model)
    for other, message in ((base, 'not patched'), (model, 'drop_unread_parameters'), ('model', 'not str')):
        with pytest.raises(ModelError, match=message), sem_timm.disabled(other):  # type: ignore[arg-type]
            raise AssertionError
