"""Parameters that a swap cuts off from the output: the plan names them, and they stop being trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import Family
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES, SHARED_TABLES, by_form
from tests.swap.small_attention import WIDTH, Model, Plain
from tests.swap.swapping import assert_all_learn, backward, outputs, swap, swapped, without_gradient
from tests.thorough import first_of_each

FAMILIES = {
    **SHARED_TABLES,
    **{
        name: CLASSES[name]
        for name in (
            'layers.attention2d.MultiQueryAttention2d',
            'models.beit.Attention',
            'models.efficientformer_v2.Attention2dDownsample',
            'models.gemma4_vit.Gemma4Attention',
            'models.levit.Attention',
            'models.maxxvit.AttentionCl',
            'models.mvitv2.MultiScaleAttention',
            'models.nextvit.EfficientAttention',
            'models.pvt_v2.Attention',
            'models.swin_transformer_v2.WindowAttention',
            'models.tnt.Attention',
            'models.vision_transformer_sam.Attention',
        )
    },
}


def unreached(model: nn.Module, family: Family) -> set[str]:
    """Names of the parameters that autograd finds no way to."""
    model.requires_grad_(True)
    backward(model, family.images())
    return without_gradient(model)


def assert_the_plan_agrees_with_autograd(family: Family, operation: str, **options: Any) -> sem_timm.Plan:
    model, other = family.create(), family.create()
    plan = sem_timm.plan_model(other, operation, input_size=family.input_size, **options)
    swap(other, plan)
    frozen = {name for name, parameter in other.named_parameters() if not parameter.requires_grad}
    assert frozen == set(plan.unread)
    assert unreached(other, family) - unreached(model, family) == set(plan.unread)
    return plan


@pytest.mark.parametrize('name', by_form(FAMILIES))
def test_the_plan_names_the_parameters_that_autograd_no_longer_reaches(name: str) -> None:
    unread = assert_the_plan_agrees_with_autograd(FAMILIES[name], 'external').unread
    assert unread


@pytest.mark.parametrize(
    'name',
    first_of_each(['models.swin_transformer_v2.WindowAttention', 'models.mvitv2.MultiScaleAttention', 'beit shared']),
)
@pytest.mark.parametrize('operation', ['efficient', 'linear', 'catt', 'caam'])
def test_where_keys_are_read_only_position_biases_are_not(name: str, operation: str) -> None:
    unread = assert_the_plan_agrees_with_autograd(FAMILIES[name], operation).unread
    tables = ('rel_pos', 'relative_position', 'cpb_mlp', 'logit_scale')
    assert unread and all(any(table in parameter for table in tables) for parameter in unread)


@pytest.mark.parametrize('name', ['layers.attention.Attention', 'models.levit.Attention', 'models.convit.MHSA'])
def test_nothing_of_a_replaced_module_is_read(name: str) -> None:
    family = CLASSES[name]
    plan = assert_the_plan_agrees_with_autograd(family, 'eamlp')
    modules = {site.name for site in plan}
    names = (name for name, _ in family.create().named_parameters())
    assert [*plan.unread] == [name for name in names if any(name.startswith(f'{module}.') for module in modules)]


def test_a_table_that_a_kept_block_still_reads_is_trained() -> None:
    family = SHARED_TABLES['beit shared']
    unread = assert_the_plan_agrees_with_autograd(family, 'external', target='blocks.0.attn').unread
    assert unread == ('blocks.0.attn.v_bias',)
    both = assert_the_plan_agrees_with_autograd(family, 'external').unread
    assert both == ('rel_pos_bias.relative_position_bias_table', *(f'blocks.{i}.attn.v_bias' for i in range(2)))


def test_what_the_rest_of_a_model_made_useless_does_not_count() -> None:
    """A parameter that no gradient reached before the swap stays as it is."""
    family = CLASSES['models.swin_transformer.WindowAttention']
    model = family.create()
    model.layers[0].blocks[0].attn.extra = nn.Parameter(torch.ones(3))
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    assert not any('extra' in name for name in plan.unread)
    swap(model, plan)
    assert model.layers[0].blocks[0].attn.extra.requires_grad


def test_rows_of_packed_weights_that_are_not_read_get_gradients_of_zero() -> None:
    family = CLASSES['layers.attention.Attention']
    model = family.create()
    plan = sem_timm.plan_model(model, 'external')
    assert set(plan.sliced) == {f'{site.name}.qkv.weight' for site in plan}
    backward(swap(model, plan), family.images())
    for name, rows in plan.sliced.items():
        weight = model.get_parameter(name)
        assert (rows.first, rows.last, rows.total) == (0, weight.shape[0] // 3, weight.shape[0])
        assert weight.grad[: rows.last].any() and not weight.grad[rows.last :].any()


def test_undo_lets_train_what_was_trained_before_and_nothing_else() -> None:
    family = CLASSES['models.swin_transformer_v2.WindowAttention']
    model = family.create()
    model.layers[0].blocks[0].attn.logit_scale.requires_grad_(False)
    before = snapshot(model)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    swap(model, plan)
    assert not any(model.get_parameter(name).requires_grad for name in plan.unread)
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


def test_trainable_parameters_are_those_that_learn() -> None:
    family = CLASSES['models.swin_transformer_v2.WindowAttention']
    model = family.create()
    every = {id(p) for p in sem_timm.trainable_parameters(model)}
    assert every == {id(p) for p in model.parameters()}
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    swap(model, plan)
    useless = {id(model.get_parameter(name)) for name in plan.unread}
    # A training script that lets everything train does not bring the useless ones back.
    for unfrozen in (False, True):
        if unfrozen:
            model.requires_grad_(True)
        found = {id(p) for p in sem_timm.trainable_parameters(model)}
        assert found == {id(p) for p in model.parameters()} - useless
    model.layers[1].requires_grad_(False)
    kept = {id(p) for p in sem_timm.trainable_parameters(model)}
    assert kept == found - {id(p) for p in model.layers[1].parameters()}


def test_copies_know_what_is_useless_too() -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model = swapped(family)
    twin = copy.deepcopy(model)
    assert len(list(sem_timm.trainable_parameters(twin))) == len(list(sem_timm.trainable_parameters(model)))
    backward(twin, family.images())
    assert_all_learn(twin)
    sem_timm.unpatch_model(twin)
    assert all(p.requires_grad for p in twin.parameters())
    assert outputs(twin, family.images())[0].equal(outputs(family.create(), family.images())[0])


@pytest.mark.parametrize(('exclude', 'is_trained'), [(None, False), ('layers.0.blocks.1.attn', True)])
def test_a_table_that_two_modules_share_is_trained_while_one_reads_it(exclude: str | None, is_trained: bool) -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model: Any = family.create()
    first, second = (model.layers[0].blocks[block].attn for block in (0, 1))
    second.relative_position_bias_table = first.relative_position_bias_table
    swap(model, 'external', exclude=exclude, input_size=family.input_size)
    assert first.relative_position_bias_table.requires_grad is is_trained
    backward(model, family.images())
    assert without_gradient(model) == set()
    sem_timm.unpatch_model(model)
    assert first.relative_position_bias_table.requires_grad


class ReturnsValues(Plain):
    """Gives its values to whoever asks for them."""

    def forward(self, x: Tensor) -> Any:
        values = self.heads(self.v(x))
        out = self.attend(self.heads(self.q(x)), self.heads(self.k(x)), values)
        return self.proj(out.transpose(1, 2).flatten(2)), values


@pytest.mark.parametrize('use', [False, True])
def test_what_is_returned_and_not_used_is_unread(use: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ReturnsValues()

        def forward(self, x: Tensor) -> Tensor:
            out, values = self.inner(x)
            return out + values.mean() if use else out

    model = Model(Outer())
    plan = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    keys = {f'attention.inner.k.{name}' for name in ('weight', 'bias')}
    values = {f'attention.inner.v.{name}' for name in ('weight', 'bias')}
    assert set(plan.unread) == (keys if use else keys | values)
    swap(model, plan)
    backward(model, torch.randn(2, 3, 32, 32))
    assert without_gradient(model) == set()


def test_values_that_only_lend_their_type_are_unread() -> None:
    family = Family('eva02_base_patch14_448', 56, options={'img_size': 56, 'depth': 1, 'embed_dim': 64, 'num_heads': 2})
    unread = assert_the_plan_agrees_with_autograd(family, 'external').unread
    assert {'blocks.0.attn.v_proj.weight', 'blocks.0.attn.v_proj.bias', 'blocks.0.attn.k_proj.weight'} <= set(unread)


class AsksKeys(Plain):
    """Scales queries by a size of the keys, which the old core alone computes with."""

    def __init__(self, ask: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.ask = ask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.ask(k)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    'ask',
    [
        lambda k: k.shape[-1] ** -0.5,
        lambda k: 1 / math.sqrt(k.size(3)),
        lambda k: k.size(dim=-1) ** -0.5,
        lambda k: k.mT.shape[-2] ** -0.5,
        lambda k: (k.size()[-1] * k.shape[1]) ** -0.5,
    ],
)
def test_keys_that_only_lend_their_width_are_told_and_not_trained(ask: Callable[[Tensor], float]) -> None:
    model = Model(AsksKeys(ask))
    plan = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert plan.computed == ('attention.k',) and 'Still computed' in repr(plan)
    assert {'attention.k.weight', 'attention.k.bias'} <= set(plan.unread)
    swap(model, plan)
    queries: list[Tensor] = []
    model.attention.core.register_forward_pre_hook(lambda _, given: queries.append(given[0]))
    images = torch.randn(2, 3, 48, 48)
    backward(model, images)
    assert without_gradient(model) == set()
    attention = model.attention
    q, k = (attention.heads(layer(model.patches(images).flatten(2).mT)) for layer in (attention.q, attention.k))
    torch.testing.assert_close(queries[0], q * ask(k))


class AsksMoreKeys(AsksKeys):
    """Has tokens of its own in front of keys and values."""

    def __init__(self) -> None:
        super().__init__(lambda k: k.shape[-1] ** -0.5)
        self.extra = nn.Parameter(torch.randn(2, 1, 2, 3, WIDTH // 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (
            torch.cat([extra.expand(q.shape[0], -1, -1, -1), tokens], dim=2)
            for extra, tokens in zip(self.extra, (k, v), strict=True)
        )
        return super().attend(q, k, v)


def test_learned_keys_that_only_lend_their_width_are_unread() -> None:
    model = swap(Model(AsksMoreKeys()), 'external', input_size=(3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    assert not model.attention.extra.requires_grad
    backward(model, images)
    assert without_gradient(model) == set()
    expected = outputs(model, images)
    sem_timm.drop_unread_parameters(model)  # keeps what is still computed
    torch.testing.assert_close(outputs(model, images), expected)


def test_how_many_keys_there_are_is_asked_each_time() -> None:
    """With as many tokens as channels when it is planned."""
    model = swap(Model(AsksKeys(lambda k: 1 / k.shape[-2])), 'external', input_size=(3, 32, 32))
    queries: list[Tensor] = []
    model.attention.core.register_forward_pre_hook(lambda _, given: queries.append(given[0]))
    images = torch.randn(2, 3, 48, 48)
    outputs(model, images)
    q = model.attention.heads(model.attention.q(model.patches(images).flatten(2).mT))
    torch.testing.assert_close(queries[0], q / 36)
