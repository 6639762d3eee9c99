"""A name means one thing everywhere: as an operation, inside SEM, in a plan, in a file and in timm's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from sem_timm import ExcitationConfig, OptionError, TimmAttentionConfig
from sem_timm.layers import attention_names, timm_attention, timm_attention_names
from sem_timm.layers.operators import PUBLISHED_EXCITATIONS
from sem_timm.operations import resolve_operation
from sem_timm.persistence.configurations import config_from_json, config_to_json
from sem_timm.persistence.strict_json import Field
from tests.families import FAMILIES

PLACE: dict[str, Any] = {'target': ['layer2.0'], 'input_size': (3, 256, 256)}  # maps on which all of timm's work


def children(name: str) -> nn.Module:
    """What an operation puts into a block of a ResNet."""
    model = sem_timm.patch_model(FAMILIES['resnet'].create(), name, **PLACE)
    (record,) = sem_timm.patched_modules(model)
    (child,) = record.inserted
    assert child.rstrip('_') == name  # with a line behind it where timm's block has a child of that name
    return model.get_submodule(f'{record.name}.{child}')


@pytest.mark.parametrize('name', PUBLISHED_EXCITATIONS)
def test_an_excitation_is_the_same_as_an_operation_and_inside_sem(name: str) -> None:
    assert resolve_operation(name) == ExcitationConfig(name)
    alone: Any = children(name)
    inside = sem_timm.SEM(alone.channels, operators=(name,))
    assert type(alone.operators[name]) is type(inside.operators[name]) is PUBLISHED_EXCITATIONS[name]
    x = torch.randn(2, alone.channels, 5, 5)
    assert torch.equal(inside(x), x) and torch.equal(alone(x), x)


@pytest.mark.parametrize('name', ['sem', *PUBLISHED_EXCITATIONS, 'ssf', 'external2d'])
def test_what_this_package_inserts_is_an_exact_identity(name: str) -> None:
    family = FAMILIES['resnet']
    model = family.create()
    with torch.no_grad():
        expected = model(family.images())
        plan = sem_timm.plan_model(model, name, input_size=family.input_size)
        assert 'the outputs stay bit for bit the same' in str(plan) and plan.operation.is_identity
        assert torch.equal(expected, sem_timm.patch_model(model, plan)(family.images()))


@pytest.mark.parametrize('name', timm_attention_names())
def test_what_is_timms_is_asked_for_as_timms_and_changes_the_outputs(name: str) -> None:
    operation = f'timm_{name}'
    assert resolve_operation(operation) == TimmAttentionConfig(name)
    plan = sem_timm.plan_model(FAMILIES['resnet'].create(), operation, **PLACE)
    assert str(plan).count(f'{operation} on ResNet') == 1 and 'the outputs change' in str(plan)
    assert plan.to_dict()['operation']['name'] == operation
    assert type(children(operation)) is type(timm_attention(name, 64, device='meta'))


def test_names_of_timm_alone_say_how_they_are_asked_for() -> None:
    model = FAMILIES['resnet'].create()
    plain = set(timm_attention_names()) - {*sem_timm.excitation_names(), *attention_names()}
    assert {'cbam', 'gc', 'sk'} <= plain
    for name in plain:
        with pytest.raises(OptionError, match=f"'{name}' is unknown.*asked for as 'timm_{name}'.* changes the outputs"):
            sem_timm.plan_model(model, name)
    for name in ('timm_cbm', 'timm_', 'timm_bat', 'timm_timm_cbam'):
        with pytest.raises(OptionError, match=f"operation '{name}' is unknown"):
            sem_timm.plan_model(model, name)


class Scaling(nn.Module):
    """An excitation operator of one's own."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def zero_last_weights(self) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled * self.scale


def test_a_plain_name_of_timms_can_be_registered_and_is_then_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sem_timm.layers.operators._excitations', dict(PUBLISHED_EXCITATIONS))
    sem_timm.register_excitation('cbam', Scaling)
    assert resolve_operation('cbam') == ExcitationConfig('cbam')
    assert type(children('cbam').operators['cbam']) is Scaling  # type: ignore[union-attr, index]
    assert resolve_operation('timm_cbam') == TimmAttentionConfig('cbam')
    with pytest.raises(OptionError, match=r"name='timm_scaling': names with 'timm_' in front are timm's own"):
        sem_timm.register_excitation('timm_scaling', Scaling)


def test_no_two_operations_have_one_name_or_one_configuration_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sem_timm.layers.operators._excitations', dict(PUBLISHED_EXCITATIONS))  # not those of tests
    names = sem_timm.operation_names()
    written = [config_to_json(resolve_operation(name)) for name in names]
    assert all(written.count(each) == 1 for each in written)
    for name, each in zip(names, written):
        config = config_from_json(Field(Path('patch.json'), 'operations[0]', each))
        assert str(config) == name and config == resolve_operation(name)
