"""Which small modules are seen to be a projection with a batch norm, and which are called as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import outputs, swap


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

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.BatchNorm1d(3 * WIDTH, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Activated(Normed):
    """Has an activation in between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).relu().transpose(1, 2)).transpose(1, 2)


class Centred(Normed):
    """Adds something in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(0) if self.training else x


class Reversed(Normed):
    """Moves channels, so that rows of the output are not those of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


def swap_small(packed: nn.Module) -> tuple[nn.Module, Any]:
    model = Model(Packed(packed)).eval()
    plan = sem_timm.plan_model(model, 'external', target='attention', input_size=(3, 32, 32))
    return swap(model, plan), plan


def test_a_projection_with_a_norm_of_ones_own() -> None:
    for options in ({}, {'affine': False}):
        model, plan = swap_small(Normed(**options))
        assert set(plan.sliced) == {'attention.packed.linear.weight'}
        whole: Any = copy.deepcopy(model)
        whole.attention.packed.register_forward_hook(lambda *_: None)
        images = torch.randn(4, 3, 32, 32)
        for training in (True, False):
            found, expected = (outputs(each.train(training), images) for each in (model, whole))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    'packed',
    [
        Activated(),
        Centred(),
        Reversed(),
        Normed(momentum=None),
        Normed(track_running_stats=False),
    ],
    ids=['Activated', 'Centred', 'Reversed', 'momentum', 'no statistics'],
)
def test_a_projection_that_does_more_is_called_as_a_whole(packed: nn.Module) -> None:
    model, plan = swap_small(packed)
    assert plan.sliced == {} and 'self.packed(' in plan.code('attention')
    outputs(model.train(), torch.randn(2, 3, 32, 32))


def test_a_norm_that_changed_after_the_swap_is_called_as_a_whole() -> None:
    model: Any
    model, _ = swap_small(Normed())
    model.attention.packed.norm.momentum = None
    whole = copy.deepcopy(model)
    whole.attention.packed.register_forward_hook(lambda *_: None)
    images = torch.randn(4, 3, 32, 32)
    found, expected = (outputs(each.train(), images) for each in (model, whole))
    torch.testing.assert_close(found, expected)
    assert model.attention.packed.norm.running_mean.equal(whole.attention.packed.norm.running_mean)
