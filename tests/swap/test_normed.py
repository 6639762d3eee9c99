"""Packed projections with a batch norm: all rows are computed as before, and the plan says that some go unread."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import assert_all_learn, backward, outputs, swap, swapped
from tests.thorough import first_of_each

# A site, and its child that is a linear layer or convolution with a batch norm; of several groups the first, which is
# given what it always was, while the others are given what attention returned before them, too.
NORMED = {
    'models.levit.Attention': ('stages.0.blocks.0.attn', 'qkv'),
    'models.shvit.SHSA': ('stages.1.blocks.0.mixer.m', 'qkv'),
    'models.efficientvit_msra.CascadedGroupAttention': ('stages.0.blocks.0.mixer.m.attn', 'qkvs.0'),
}
normed = pytest.mark.parametrize('name', first_of_each(NORMED))


@normed
def test_the_plan_tells_of_which_children_more_is_computed_than_read(name: str) -> None:
    family = CLASSES[name]
    site, child = NORMED[name]
    plan = sem_timm.plan_model(family.create(), 'external', input_size=family.input_size)
    assert f'{site}.{child}' in plan.computed and not plan.sliced
    assert 'Still computed, in whole or in part for nobody: ' in repr(plan)
    assert f'{site}.{child}' in plan.to_dict()['computed']


@normed
def test_running_statistics_are_those_of_the_base(name: str) -> None:
    family = CLASSES[name]
    site, child = NORMED[name]
    base = family.create()
    model = swap(copy.deepcopy(base), 'external', target=site, input_size=family.input_size)
    before = dict(copy.deepcopy(base).get_submodule(f'{site}.{child}').named_buffers())
    for each in (base, model):
        outputs(each.train(), family.images(3))
    found, expected = (dict(each.get_submodule(f'{site}.{child}').named_buffers()) for each in (model, base))
    for key, statistic in expected.items():
        assert not torch.equal(statistic, before[key])
        torch.testing.assert_close(found[key], statistic)


@normed
def test_every_new_weight_learns(name: str) -> None:
    model = swapped(CLASSES[name]).train()
    backward(model, CLASSES[name].images())
    assert_all_learn(model)


@normed
def test_undo_and_the_keys_of_the_base(name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    before = snapshot(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    swap(model, input_size=family.input_size)
    assert {key: value.shape for key, value in model.state_dict().items() if '.core' not in key} == shapes
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


class Packed(Projected):
    """Queries, keys and values of one child."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).chunk(3, dim=-1)
        out = self.attend(self.heads(q), self.heads(k), self.heads(v))
        return self.proj(out.transpose(1, 2).flatten(2))


class Normed(nn.Module):
    """A linear layer and a norm over its output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.BatchNorm1d(3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Reversed(Normed):
    """Moves channels, so that rows of the output are not those of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


@pytest.mark.parametrize('packed', [Normed(), Reversed()], ids=['normed', 'reversed'])
def test_a_child_that_is_more_than_a_projection_is_called_as_a_whole(packed: nn.Module) -> None:
    model: Any = Model(Packed(packed)).eval()
    plan = sem_timm.plan_model(model, 'external', target='attention', input_size=(3, 32, 32))
    assert plan.computed == ('attention.packed',) and 'self.packed(' in plan.code('attention')
    swap(model, plan)
    queries: list[Tensor] = []
    model.attention.core.register_forward_pre_hook(lambda _, given: queries.append(given[0]))
    images = torch.randn(2, 3, 32, 32)
    outputs(model, images)
    whole = model.attention.packed(model.patches(images).flatten(2).mT)
    torch.testing.assert_close(queries[0], model.attention.heads(whole.chunk(3, -1)[0]))
