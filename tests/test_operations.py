"""What can be inserted: SEM, its parts, timm's own channel attentions, modules of one's own."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import InsertConfig, OptionError, SEMConfig, TimmAttentionConfig
from sem_timm.layers import attention_names, timm_attention_names
from sem_timm.layers.operators import PUBLISHED_EXCITATIONS
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot
from tests.thorough import first_of_each

OWN = ('sem', *PUBLISHED_EXCITATIONS, 'ssf', 'external2d')
TIMM = tuple(f'timm_{name}' for name in timm_attention_names())
INSERTIONS = (*OWN, *TIMM)


def test_operation_names() -> None:
    names = sem_timm.operation_names()
    assert names[:7] == ('sem', 'se', 'eca', 'ie', 'ceca', 'ese', 'lct')
    assert len(set(names)) == len(names)
    assert set(names) - {*sem_timm.excitation_names()} == {*INSERTIONS, *attention_names()} - {*PUBLISHED_EXCITATIONS}


# A block with maps of 8 x 8, one of tokens with prefix tokens, one with channels last.
PLACES = {'resnet': r'layer2\.0', 'vit_registers': r'blocks\.1', 'swin': r'layers\.0\.blocks\.1'}
CELLS = [('sem', place) for place in PLACES] + [(name, place) for place in PLACES for name in INSERTIONS[1:]]


@pytest.mark.parametrize(
    ('name', 'place'), first_of_each(CELLS, lambda name, place: (name, place if name in ('sem', 'timm_halo') else None))
)
def test_every_operation_by_its_name(name: Any, place: str) -> None:
    family, target = FAMILIES[place], PLACES[place]
    model = family.create()
    before = snapshot(model)
    if name == 'timm_halo' and place == 'vit_registers':  # its blocks are of 8 x 8; there are 4 x 4 tokens
        with pytest.raises(sem_timm.RefusedError, match=r'blocks\.1: timm_halo does not work on \(B, 21, 64\): \w+'):
            sem_timm.plan_model(model, name, target=target, input_size=family.input_size)
        return
    with torch.no_grad():
        expected = model(family.images())
    plan = sem_timm.plan_model(model, name, target=target, input_size=family.input_size)
    assert len(plan) == 1
    total = sum(p.numel() for p in model.parameters())
    sem_timm.patch_model(model, plan)
    assert sum(p.numel() for p in model.parameters()) - total == plan.num_parameters
    with torch.no_grad():
        same = torch.equal(expected, model(family.images()))
    identity = plan.to_dict()['identity']
    # timm's non-local block happens to start at zero too, up to rounding.
    assert same == identity or name == 'timm_nl'
    assert ('stay bit for bit the same' in str(plan)) == identity and ('outputs change' in str(plan)) != identity
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('name', INSERTIONS)
def test_every_operation_on_a_whole_network_learns(name: Any) -> None:
    size = 256 if name == 'timm_halo' else 64  # in every stage its blocks of 8 x 8
    model = FAMILIES['resnet'].create()
    sem_timm.patch_model(model, name, input_size=(3, size, size))
    model(FAMILIES['resnet'].images(2, size)).square().mean().backward()
    for record in sem_timm.patched_modules(model):
        new = list(model.get_submodule(f'{record.name}.{record.inserted[0]}').parameters())
        assert not new or any(p.grad is not None and p.grad.any() for p in new)


def test_identities_are_the_operations_of_this_package() -> None:
    model = FAMILIES['resnet'].create()
    place = {'target': PLACES['resnet'], 'input_size': (3, 64, 64)}
    plans = {name: sem_timm.plan_model(model, name, **place) for name in INSERTIONS}
    identities = {name for name, plan in plans.items() if plan.to_dict()['identity']}
    assert identities == set(OWN)
    assert not sem_timm.plan_model(model, init='paper').operation.is_identity


class Own(nn.Module):
    """A module of one's own, for channels first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.conv(x)


def test_a_module_of_ones_own() -> None:
    for name, shapes in (
        ('resnet', [(2, 32, 16, 16)]),
        ('vit_registers', [(2, 64, 4, 4)]),
        ('swin', [(2, 24, 16, 16)]),
    ):
        family = FAMILIES[name]
        model = sem_timm.patch_model(family.create(), Own, input_size=family.input_size)
        own = [module for module in model.modules() if isinstance(module, Own)]
        assert len(own) == len(sem_timm.patched_modules(model))
        with torch.no_grad():
            model(family.images())
        assert own[0].shapes == shapes
        assert all('inserted' in record.inserted for record in sem_timm.patched_modules(model))


def test_a_function_that_makes_modules_and_a_name() -> None:
    operation = InsertConfig(lambda channels: nn.GroupNorm(4, channels), name='group_norm')
    model = sem_timm.patch_model(FAMILIES['resnet'].create(), operation)
    assert isinstance(model.layer1[0].group_norm, nn.GroupNorm)
    assert 'layer1.0.group_norm.weight' in model.state_dict()
    # One that stands for a whole network is not asked for more than it can do.
    with pytest.raises(sem_timm.RefusedError, match='divisible'):
        sem_timm.plan_model(model, lambda channels: nn.GroupNorm(7, channels), target='layer2.0.conv2')


def test_new_modules_have_device_dtype_and_mode_of_their_block() -> None:
    for operation in ('sem', 'timm_cbam', Own):
        model = FAMILIES['resnet'].create().to(torch.bfloat16)
        plan = sem_timm.plan_model(model, operation)
        model.layer1.train()
        sem_timm.patch_model(model, plan)
        for record in sem_timm.patched_modules(model):
            block = model.get_submodule(record.name)
            new = block.get_submodule(record.inserted[0])
            assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
            assert {m.training for m in new.modules()} == {block.training}
        model = FAMILIES['resnet'].create()
        plan = sem_timm.plan_model(model, operation)
        sem_timm.patch_model(model.to('meta'), plan)
        assert {p.device.type for p in model.parameters()} == {'meta'}


def test_a_name_that_is_taken_is_not_reused() -> None:
    """SENet's blocks have a child `se` already."""
    model = FAMILIES['regnet'].create()
    plan = sem_timm.plan_model(model, 'se', target=r's1\.b1')
    assert model.s1.b1.se is not None
    assert plan.sites[0].attribute != 'se'
    own = model.s1.b1.se
    sem_timm.patch_model(model, plan)
    assert model.s1.b1.se is own
    sem_timm.unpatch_model(model)
    assert model.s1.b1.se is own and [*dict(model.s1.b1.named_children())].count('se') == 1


def test_names_that_python_keeps_for_itself() -> None:
    model = FAMILIES['resnet'].create()
    sem_timm.patch_model(model, 'timm_lambda', target='layer1.0')
    assert len(sem_timm.patched_modules(model)) == 1
    with pytest.raises(OptionError, match=r"name='class' is no identifier"):
        InsertConfig(Own, name='class')


def test_configurations_are_values() -> None:
    assert SEMConfig() == SEMConfig(operators=['se', 'eca', 'ie']) and hash(SEMConfig()) == hash(SEMConfig())
    assert SEMConfig(operators='se').operators == ('se',)
    own = ['reduction', 'operators', 'init', 'decision']
    assert [*inspect.signature(SEMConfig).parameters] == [*own, 'position', 'branches']
    with pytest.raises(AttributeError):
        SEMConfig().reduction = 8  # type: ignore[misc]
    model = FAMILIES['resnet'].create()
    by_name = sem_timm.plan_model(model, 'sem', reduction=8, operators=('se',), position='output')
    assert by_name.operation == SEMConfig(8, ('se',), position='output')
    assert {site.position for site in by_name} == {'output'}


class Halving(nn.Module):
    """An excitation operator of one's own."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def zero_last_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled * self.weight


def test_an_operator_of_ones_own() -> None:
    model, images = FAMILIES['resnet'].create(), FAMILIES['resnet'].images()
    with torch.no_grad():
        expected = model(images)
        sem_timm.patch_model(model, operators=('se', Halving))
        assert torch.equal(expected, model(images))
    assert 'layer1.0.sem.operators.Halving.weight' in model.state_dict()
    assert json.dumps(sem_timm.patched_modules(model)[0].operation.to_dict()).count('Halving') == 1


class OwnCore(sem_timm.AttentionCore):
    """An attention core of one's own, with a class for an option."""

    def __init__(self, head_dim: int, act: Any = nn.GELU, **kwargs: Any) -> None:
        super().__init__(head_dim, **kwargs)


def test_own_code_is_told_by_its_name() -> None:
    config = sem_timm.AttentionConfig(OwnCore, act=nn.SiLU)
    assert json.dumps(config.to_dict()) == '{"name": "OwnCore", "act": "torch.nn.modules.activation.SiLU"}'


def test_options_that_nothing_has_are_an_error() -> None:
    for operation, options in (
        ('external', {'attention': 'linear'}),
        (OwnCore, {'attention': 'linear'}),
        ('eca', {'name': 'x'}),
    ):
        with pytest.raises(OptionError, match=r"option '(attention|name)' of .* is unknown"):
            sem_timm.plan_model(FAMILIES['vit_registers'].create(), operation, **options)
    with pytest.raises(OptionError, match='timm attention 3 is unknown'):
        TimmAttentionConfig(name=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match='name=3 is no identifier'):
        InsertConfig(Own, name=3)  # type: ignore[arg-type]


def test_positions() -> None:
    model, images = FAMILIES['vit_registers'].create(), FAMILIES['vit_registers'].images()
    with torch.no_grad():
        expected = model(images)
        for position in ('auto', 'residual', 'output'):
            sem_timm.patch_model(model, position=position)
            assert {record.position for record in sem_timm.patched_modules(model)} == {
                'output' if position == 'output' else 'residual'
            }
            assert torch.equal(expected, model(images))
            sem_timm.unpatch_model(model)
    with pytest.raises(sem_timm.RefusedError, match='no residual'):
        sem_timm.plan_model(FAMILIES['vgg'].create(), position='residual', input_size=(3, 32, 32))


def test_timm_attentions_that_do_not_fit_are_refused_with_their_reason() -> None:
    model = timm.create_model('test_resnet', num_classes=10)
    with pytest.raises(sem_timm.RefusedError, match=r'timm_halo does not work on \(B, 32, 12, 12\): \w+'):
        sem_timm.plan_model(model, TimmAttentionConfig('halo'), input_size=(3, 48, 48))
    with pytest.raises(OptionError, match="'bat'"):
        sem_timm.plan_model(model, 'bat')
