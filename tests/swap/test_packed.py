"""Packed projections whose weight or bias is joined of several: those that hold no row that is read are let go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import Family
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES, SHARED_TABLES
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import backward, outputs, swap, swapped, tensors
from tests.swap.test_cost import names_read
from tests.thorough import first_of_each

JOINED = ('models.beit.Attention', 'models.eva.EvaAttention', 'models.swin_transformer_v2.WindowAttention')

NORMED = ('models.levit.Attention', 'models.shvit.SHSA', 'models.efficientvit_msra.CascadedGroupAttention')
joined = pytest.mark.parametrize('name', JOINED)


def only_zero(model: nn.Module, family: Family) -> set[str]:
    """Names of the weights that get gradients, but only zeros, from a loss that weighs every output at random."""
    weights = torch.Generator().manual_seed(2)
    losses = [(t * torch.randn(t.shape, generator=weights)).sum() for t in tensors(model(family.images()))]
    torch.stack(losses).sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'name', first_of_each([*JOINED, *NORMED, 'beit shared', 'models.mvitv2.MultiScaleAttention'], count=2)
)
def test_no_weight_is_trained_that_has_only_gradients_of_zero(name: str, training: bool) -> None:
    """An optimizer with weight decay would shrink it."""
    family = {**CLASSES, **SHARED_TABLES}[name]
    model, other = family.create().train(training), swapped(family).train(training)
    assert only_zero(other, family) - only_zero(model, family) == set()


@joined
def test_of_a_joined_bias_the_pieces_read_are_read(name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    before = snapshot(model)
    assert any(key.endswith('.k_bias') for key in names_read(model, family))
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    assert {f'{site.name}.v_bias' for site in plan} <= set(plan.unread)
    assert 'cat((' not in plan.code(plan.sites[0].name)
    swap(model, plan)
    found = {key.rpartition('.')[2] for key in names_read(model, family)}
    assert 'q_bias' in found and not found & {'k_bias', 'v_bias'}
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.endswith('v_bias'))
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


@joined
def test_a_joined_bias_that_is_added_behind_the_projection_is_added_as_a_whole(name: str) -> None:
    family, results = CLASSES[name], []
    for separate in (False, True):
        model: Any = family.create()
        for module in model.modules():
            if hasattr(module, 'qkv_bias_separate'):
                module.qkv_bias_separate = separate
        plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
        assert set(plan.sliced) == (set() if separate else {f'{site.name}.qkv.weight' for site in plan})
        torch.manual_seed(0)
        results.append(outputs(swap(model, plan), family.images()))
    torch.testing.assert_close(*results)


class Joined(Projected):
    """Joins weights of its own: queries are made of one and of half of another."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.one = nn.Parameter(torch.randn(half, WIDTH))
        self.two = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.three = nn.Parameter(torch.randn(WIDTH + half, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.one, self.two, self.three], dim=0)
        q, k, v = nn.functional.linear(x, weight).chunk(3, dim=-1)
        out = self.attend(self.heads(q), self.heads(k), self.heads(v))
        return self.proj(out.transpose(1, 2).flatten(2))


def test_a_piece_of_a_joined_weight_may_be_read_in_part() -> None:
    model = Model(Joined()).eval()
    plan = sem_timm.plan_model(model, 'external', target='attention', input_size=(3, 32, 32))
    assert plan.unread[:1] == ('attention.three',)
    (rows,) = (plan.sliced[key] for key in ('attention.two',))
    assert set(plan.sliced) == {'attention.two'}
    assert (rows.first, rows.last, rows.period, rows.total) == (0, WIDTH // 2, WIDTH, WIDTH)
    queries: list[Tensor] = []
    swap(model, plan)
    attention: Any = model.attention
    attention.core.register_forward_pre_hook(lambda module, args: queries.append(args[0]))
    tokens = torch.randn(2, 16, WIDTH)
    attention(tokens)
    weight = torch.cat([attention.one, attention.two])[:WIDTH]
    torch.testing.assert_close(queries[0], attention.heads(tokens @ weight.mT))
    backward(model, torch.randn(2, 3, 32, 32))
    assert attention.one.grad.any() and attention.two.grad[: WIDTH // 2].any()
    assert not attention.two.grad[WIDTH // 2 :].any() and attention.three.grad is None


class Spelled(nn.Module):
    """Attention on packed projections, spelled in one of several ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.spelling = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), spelling

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, WIDTH // 2)
        if self.spelling == 'named':
            q, k, v = packed.permute(dims=(2, 0, 3, 1, 4)).unbind(dim=0)
        else:
            packed = packed.permute(2, 0, 3, 1, 4)
            q, k, v = packed[-3], packed[-2], packed[-1]
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('spelling', ['named', 'from the end'])
@pytest.mark.parametrize('operation', ['external', 'efficient', 'catt'])
def test_other_spellings(spelling: str, operation: str) -> None:
    model = Model(Spelled(spelling))
    swap(model, operation, input_size=(3, 32, 32))
    assert outputs(model, torch.randn(3, 3, 32, 32))[0].isfinite().all()


class ReadWhole(Spelled):
    """Reads all rows of the packed projection besides, transposed."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x)
        q, k, v = packed.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.mT).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)) + packed.mT.mean()


def test_a_projection_that_is_read_whole_keeps_its_rows() -> None:
    model = Model(ReadWhole('whole'))
    plan = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert len(plan) == 1 and not plan.sliced
