"""The other attentions, in modules that differ: with a class token, windows, fewer keys than queries, folded heads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import AttentionConfig, AttentionCore, OptionError, RefusedError
from tests.families import Family
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES, FORMS
from tests.swap.small_attention import Plain
from tests.swap.swapping import backward, outputs, shapes, swap, swapped, without_gradient
from tests.thorough import first_of_each
from tests.twins import assert_equal, inserted

CORES = ('efficient', 'linear', 'halo', 'monarch', 'catt', 'caam')

MODELS = {form: CLASSES[name] for form, name in FORMS.items()}


def test_the_attentions() -> None:
    from sem_timm.layers import attention_names

    assert set(attention_names()) == {'external', 'eamlp', *CORES} <= set(sem_timm.operation_names())


# Each attention in four models, and in each of the other models one.
PAIRS = [
    (name, operation)
    for name in ('class token', 'windows', 'fewer keys', 'one key for all heads')
    for operation in CORES
]
PAIRS += [
    ('rotary', 'halo'),
    ('rotary', 'monarch'),
    ('channels first', 'efficient'),
    ('transposed', 'linear'),
    ('folded heads', 'catt'),
    ('windows behind heads', 'caam'),
    ('several cores', 'halo'),
    ('transposed', 'monarch'),
]


@pytest.mark.parametrize(('name', 'operation'), first_of_each(PAIRS, lambda name, operation: operation))
def test_shapes_gradients_copies_and_undo(name: str, operation: str) -> None:
    family = MODELS[name]
    base, model = family.create(), family.create()
    before = snapshot(model)
    plan = sem_timm.plan_model(model, operation, input_size=family.input_size)
    swap(model, plan)
    backward(model, family.images())
    assert without_gradient(model) == set()
    new = inserted(model)
    assert len(new) == sum(len(list(model.get_submodule(f'{s.name}.{s.attribute}').parameters())) for s in plan)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.values())
    for batch_size in (1, 3):
        assert shapes(model, family.images(batch_size)) == shapes(base, family.images(batch_size))
    expected = outputs(model, family.images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(expected, outputs(other, family.images()))
    model.zero_grad()
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('operation', ['efficient', 'linear', 'catt', 'caam'])
@pytest.mark.parametrize('name', first_of_each(['class token', 'windows', 'fewer keys', 'transposed']))
def test_another_resolution(name: str, operation: str) -> None:
    family = MODELS[name]
    model = swapped(family, operation)
    images = family.images(1, family.other_size)
    assert shapes(model, images) == shapes(family.create(), images)


@pytest.mark.parametrize('name', ['class token', 'fewer keys', 'windows'])
def test_attention_to_the_sample_alone_is_softmax_attention(name: str) -> None:
    """In front of training 'catt' attends to the sample alone: the old attention, but for its position bias."""
    family = MODELS[name]
    base, model = family.create(), swapped(family, 'catt')
    for each in (base, model):
        for parameter_name, parameter in each.named_parameters():
            if 'relative_position_bias_table' in parameter_name:
                nn.init.zeros_(parameter)
        for module in each.modules():
            if getattr(module, 'attn_mask', None) is not None:
                module.attn_mask.zero_()
            if hasattr(module, 'dynamic_mask'):
                module.dynamic_mask, module.shift_size = False, (0, 0)
    torch.testing.assert_close(outputs(base, family.images()), outputs(model, family.images()), rtol=1e-4, atol=1e-4)


# Halo attention, which needs a grid


def test_halo_knows_class_tokens_and_grids() -> None:
    vit = sem_timm.plan_model(MODELS['class token'].create(), 'halo')
    assert {(site.num_prefix_tokens, site.shape[-2]) for site in vit} == {(1, 17)}
    family = MODELS['channels first']
    coatnet = sem_timm.plan_model(family.create(), 'halo', input_size=family.input_size)
    assert [site.grid_size for site in coatnet] == [(4, 4), (4, 4), (2, 2)]
    family = Family('vit_tiny_patch16_dinov3_qkvb', options={'img_size': 64, 'depth': 1})
    (site,) = sem_timm.plan_model(family.create(), 'halo', input_size=family.input_size)
    assert (site.num_prefix_tokens, site.shape[-2]) == (5, 21)


@pytest.mark.parametrize('size', [(64, 96), (32, 128), (128, 32)])
def test_halo_on_grids_that_are_no_square(size: tuple[int, int]) -> None:
    model = MODELS['class token'].create(img_size=size, dynamic_img_size=False)
    plan = sem_timm.plan_model(model, 'halo')
    assert {(site.grid_size, site.num_prefix_tokens) for site in plan} == {((size[0] // 16, size[1] // 16), 1)}
    swap(model, plan)
    assert model.blocks[0].attn.core.grid_size == (size[0] // 16, size[1] // 16)
    backward(model, torch.randn(2, 3, *size))


def test_halo_knows_windows() -> None:
    family = MODELS['windows']
    assert {site.grid_size for site in sem_timm.plan_model(family.create(), 'halo', input_size=family.input_size)} == {
        (4, 4)
    }
    model = family.create(window_size=(2, 8))
    plan = sem_timm.plan_model(model, 'halo', target=r'layers\.0\..*', input_size=family.input_size)
    assert {(site.grid_size, site.shape[-2]) for site in plan} == {((2, 8), 16)}


def test_halo_takes_one_window_of_tokens_for_no_map() -> None:
    family = CLASSES['models.nest.Attention']
    plan = sem_timm.plan_model(family.create(), 'halo', input_size=family.input_size)
    assert {site.grid_size for site in plan} == {(4, 4)}


class Sequence(nn.Module):
    """Tokens from a linear layer, so that nothing says what grid they are."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(192, 16)
        self.attention = Plain()

    def forward(self, images: Tensor) -> Tensor:
        x = images.unfold(2, 8, 8).unfold(3, 8, 8)
        return self.attention(self.patches(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)))


def test_halo_where_nothing_tells_the_grid() -> None:
    model = Sequence()
    with refused(model, RefusedError, '16 tokens, 0 of them prefix', 'not known', 'grid_size=(height, width)'):
        sem_timm.patch_model(model, 'halo', input_size=(3, 16, 64))
    for options in ({'grid_size': (2, 8)}, {'grid_size': (3, 5), 'num_prefix_tokens': 1}):
        core: Any = swap(Sequence(), AttentionConfig('halo', **options), input_size=(3, 16, 64)).attention.core
        assert {name: getattr(core, name) for name in options} == options
    with refused(model, RefusedError, 'not those of grid_size=(4, 8)'):
        sem_timm.patch_model(model, 'halo', grid_size=(4, 8), input_size=(3, 16, 64))


def test_values_around_a_token_need_a_grid_and_its_own_value_one_for_each_query() -> None:
    model = Sequence()
    with refused(model, RefusedError, 'height and width are not known', 'grid_size=(height, width)'):
        sem_timm.patch_model(model, 'linear', local=True, input_size=(3, 16, 64))
    core: Any = swap(Sequence(), AttentionConfig('linear', local=True, grid_size=(2, 8)), input_size=(3, 16, 64))
    assert core.attention.core.grid_size == (2, 8)
    fewer = MODELS['fewer keys']
    plan = sem_timm.plan_model(fewer.create(), 'linear', own=True, input_size=fewer.input_size)
    assert all(site.shape[-2] == site.key_shape[-2] for site in plan) and len(plan)
    assert any('own=True' in found.reason and 'a value for each query' in found.reason for found in plan.refusals)


# Each attention with maps of the values, in forms of attention that differ in where the heads are.
MAPPED = [('class token', 'external'), ('windows', 'linear'), ('windows behind heads', 'efficient'), ('rotary', 'halo')]


@pytest.mark.parametrize(('name', 'operation'), first_of_each(MAPPED, lambda name, operation: operation))
def test_with_maps_of_values_it_starts_as_without_and_is_undone(name: str, operation: str) -> None:
    family = MODELS[name]
    local = name in ('class token', 'windows')
    torch.manual_seed(0)
    mapped = swap(family.create(), operation, own=True, local=local, input_size=family.input_size)
    places = [part.name for part in sem_timm.patched_modules(mapped)]  # all with a value for each query
    torch.manual_seed(0)
    model = swap(family.create(), operation, target=places, input_size=family.input_size)
    torch.testing.assert_close(outputs(mapped, family.images()), outputs(model, family.images()))
    backward(mapped, family.images())
    copied = pickle.loads(pickle.dumps(mapped))
    assert_equal(outputs(copied, family.images()), outputs(mapped, family.images()))
    sem_timm.unpatch_model(mapped)
    assert_equal(outputs(mapped, family.images()), outputs(family.create(), family.images()))


@pytest.mark.parametrize(
    ('operation', 'options', 'message'),
    [
        ('linear', {'own': 1}, 'own=1: write own=True'),
        ('eamlp', {'local': True}, 'local=True is for cores'),
        ('linear', {'lokal': True}, "'lokal'.*local"),
    ],
)
def test_options_for_maps_of_values_that_are_wrong(operation: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AttentionConfig(operation, **options)
    assert AttentionConfig('linear', own=False, local=False) == AttentionConfig('linear')


def test_options_win_over_the_grid_of_the_model() -> None:
    model = MODELS['class token'].create()
    options = {'grid_size': (2, 8), 'num_prefix_tokens': 1}
    core = swap(model, 'halo', **options).blocks[0].attn.core
    assert (core.grid_size, core.num_prefix_tokens) == ((2, 8), 1)
    with refused(MODELS['class token'].create(), RefusedError, '17 tokens, 0 of them prefix', 'grid_size'):
        sem_timm.patch_model(MODELS['class token'].create(), 'halo', num_prefix_tokens=0)


def test_halo_that_meets_another_number_of_tokens() -> None:
    model = swapped(MODELS['class token'], 'halo')
    assert outputs(model, torch.randn(1, 3, 96, 96))[0].isfinite().all()
    with pytest.raises(OptionError) as caught:
        outputs(model, torch.randn(1, 3, 64, 96))
    assert [
        p for p in ('25 tokens', '1 prefix tokens', 'no square grid', 'grid_size') if p not in str(caught.value)
    ] == []


def test_halo_where_queries_and_keys_are_not_on_one_grid() -> None:
    family = MODELS['fewer keys']
    model = family.create()
    name = 'stages.0.blocks.0.attn'
    with refused(model, RefusedError, f'{name}: ', '256 queries and 4 keys', 'one grid for both'):
        sem_timm.patch_model(model, 'halo', target=name, input_size=family.input_size)
    plan = sem_timm.plan_model(model, 'halo', input_size=family.input_size)
    assert [site.name for site in plan] == ['stages.3.blocks.0.attn'] and len(plan.refusals) == 3


# Options and classes of one's own


def test_options_reach_the_new_cores() -> None:
    family = MODELS['class token']
    for operation, options in (
        ('external', {'memory': 8, 'norm': 'softmax'}),
        ('halo', {'block_size': 2, 'halo_size': 1}),
        ('catt', {'dictionary': 16, 'init': 'paper'}),
    ):
        core = swapped(family, operation, **options).blocks[0].attn.core
        assert all(getattr(core, name) == value for name, value in options.items())
        assert type(core).__name__ in repr(core) and core.num_heads == 2
        configured = swap(family.create(), AttentionConfig(operation, **options)).blocks[0].attn.core
        assert {k: v.shape for k, v in core.state_dict().items()} == {
            k: v.shape for k, v in configured.state_dict().items()
        }


class Uniform(AttentionCore):
    """Every query gets the mean of the values, as much of it as a gate on the query says."""

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis)
        self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scale * q.mean(-1, keepdim=True)).sigmoid() * v.mean(-2, keepdim=True)


@pytest.mark.parametrize('name', ['windows', 'fewer keys', 'transposed', 'channels first'])
def test_a_core_of_ones_own(name: str) -> None:
    family = MODELS[name]
    model = swapped(family, Uniform, scale=0.5)
    site = sem_timm.patched_modules(model)[0]
    core = model.get_submodule(f'{site.name}.core')
    assert type(core) is Uniform and site.operation == AttentionConfig(Uniform, scale=0.5)
    backward(model, family.images())
    assert without_gradient(model) == set()
    assert shapes(model, family.images(1)) == shapes(family.create(), family.images(1))


class Forwarding(sem_timm.ExternalAttention):
    """A core that hands all it is given on."""

    def __init__(self, *args: Any, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = gain


def test_a_core_that_hands_its_arguments_on_takes_those_of_its_base() -> None:
    core = swapped(MODELS['class token'], Forwarding, memory=8, gain=2.0).blocks[0].attn.core
    assert (core.memory, core.gain, core.num_heads) == (8, 2.0, 2)
    with pytest.raises(OptionError, match=r"option 'memroy'.*memory"):
        AttentionConfig(Forwarding, memroy=8)
    with pytest.raises(OptionError, match="option 'head_dim'"):
        AttentionConfig(Forwarding, head_dim=8)


def test_configurations_are_values() -> None:
    config = AttentionConfig('external', norm='softmax', memory=32)
    assert config == AttentionConfig('external', memory=32, norm='softmax') != AttentionConfig('external', memory=64)
    assert hash(config) == hash(AttentionConfig('external', memory=32, norm='softmax'))
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert config.to_dict() == {'name': 'external', 'memory': 32, 'norm': 'softmax'}
    with pytest.raises((AttributeError, TypeError)):
        config.attention = 'efficient'  # type: ignore[misc]
