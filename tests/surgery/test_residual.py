"""What is a residual add and what only looks like one.

A module that returns zeros is inserted in the residual branches of small blocks; what is left of the block's output
shows which operand was taken for the branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sem_timm
from sem_timm import RefusedError
from tests.surgery.small_blocks import Net, block, left_of


def helper(x: Tensor, y: Tensor) -> Tensor:
    return x + y


# fmt: off
def plus(self: Any, x: Tensor) -> Tensor: return x + self.a(x)
def plus_on_the_right(self: Any, x: Tensor) -> Tensor: return self.a(x) + x
def torch_add(self: Any, x: Tensor) -> Tensor: return torch.add(x, self.a(x))
def torch_add_by_keyword(self: Any, x: Tensor) -> Tensor: return torch.add(self.a(x), other=x)
def add_method(self: Any, x: Tensor) -> Tensor: return self.a(x).add(x)
def add_in_place(self: Any, x: Tensor) -> Tensor: return self.a(x).add_(x)
def scaled_branch(self: Any, x: Tensor) -> Tensor: return x + self.scale * self.a(x)
def scaled_by_a_number(self: Any, x: Tensor) -> Tensor: return x + 0.2 * self.a(x)
def activation_after(self: Any, x: Tensor) -> Tensor: return (x + self.a(x)).relu()
def added_in_a_method(self: Any, x: Tensor) -> Tensor: return self.added(x, self.a(x))
def all_in_a_method(self: Any, x: Tensor) -> Tensor: return self.branch_and_sum(x)
def added_in_a_function(self: Any, x: Tensor) -> Tensor: return helper(x, self.a(x))
def added_by_sum(self: Any, x: Tensor) -> Tensor: return sum((x, self.a(x)))
def parallel_branches(self: Any, x: Tensor) -> Tensor: return x + (self.a(x) + self.b(x))
def twice_through_one_layer(self: Any, x: Tensor) -> Tensor: return x + self.a(self.a(x))
def keyword_only(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor: return x + self.a(x)
# fmt: on


def plus_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.a(x)
    out += x
    return out


def shortcut_kept_first(self: Any, x: Tensor) -> Tensor:
    shortcut = x
    x = self.a(x)
    x = x.relu()
    return x + shortcut


@pytest.mark.parametrize(
    'forward',
    [
        plus,
        plus_on_the_right,
        torch_add,
        torch_add_by_keyword,
        add_method,
        add_in_place,
        scaled_branch,
        scaled_by_a_number,
        added_in_a_method,
        all_in_a_method,
        added_in_a_function,
        added_by_sum,
        parallel_branches,
        twice_through_one_layer,
        keyword_only,
        plus_in_place,
        shortcut_kept_first,
    ],
)
@pytest.mark.parametrize('branches', ['last', 'all'])
def test_without_its_branch_a_block_is_its_shortcut(forward: Callable[..., Any], branches: str) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(forward, x, branches=branches)
    # Of parallel branches of different depth, one could pass for a projection of the other.
    assert count == 1 or forward is parallel_branches
    assert torch.equal(left, x)


def test_what_follows_the_sum_stays() -> None:
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(left_of(activation_after, x)[0], x.relu())


def two_in_a_row(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    x = x + self.b(x)
    return x


def test_of_two_in_a_row_the_last_or_all() -> None:
    x = torch.randn(2, 8, 8, 8)
    left, module, count = left_of(two_in_a_row, x)
    assert count == 1 and torch.equal(left, x + module.a(x))
    left, _, count = left_of(two_in_a_row, x, branches='all')
    assert count == 2 and torch.equal(left, x)


def three_summands(self: Any, x: Tensor) -> Tensor:
    return x + self.b(x) + self.a(x)


def three_summands_the_deeper_last(self: Any, x: Tensor) -> Tensor:
    return x + self.a(x) + self.b(x)


@pytest.mark.parametrize('forward', [three_summands, three_summands_the_deeper_last])
def test_a_sum_with_the_shortcut_in_it_is_no_branch(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, _, count = left_of(forward, x, branches='all')
    assert count == 2 and torch.equal(left, x)
    left, module, count = left_of(forward, x)
    last = module.b(x) if forward is three_summands else module.a(x)
    assert count == 1 and torch.equal(left, x + last)


# Projections and sums of parallel layers


def projection(self: Any, x: Tensor) -> Tensor:
    return self.b(x) + self.narrow(x)


def optional_projection(self: Any, x: Tensor) -> Tensor:
    shortcut = self.narrow(x) if self.narrow is not None else x
    return self.b(x) + shortcut


@pytest.mark.parametrize('forward', [projection, optional_projection])
def test_a_projection_shortcut_is_the_operand_of_fewer_layers(forward: Callable[..., Any]) -> None:
    x = torch.randn(2, 8, 8, 8)
    left, module, count = left_of(forward, x)
    assert count == 1 and torch.equal(left, module.narrow(x))


# fmt: off
def parallel_layers(self: Any, x: Tensor) -> Tensor: return self.a(x) + self.narrow(x)
def position_embedding(self: Any, x: Tensor) -> Tensor: return self.a(x + self.position)
def position_embedding_added_last(self: Any, x: Tensor) -> Tensor: return self.a(x) + self.position
def number(self: Any, x: Tensor) -> Tensor: return self.a(x) + 1
def size(self: Any, x: Tensor) -> Tensor: return self.a(x) + x.shape[0]
def doubled(self: Any, x: Tensor) -> Tensor: return self.a(x + x)
def weighted(self: Any, x: Tensor) -> Tensor: return torch.add(x, self.a(x), alpha=2)
def difference(self: Any, x: Tensor) -> Tensor: return x - self.a(x)
def broadcast(self: Any, x: Tensor) -> Tensor: return x + self.a(x).mean((2, 3), keepdim=True)
def stacked(self: Any, x: Tensor) -> Tensor: return torch.stack((x, self.a(x))).sum(0)
def untouched(self: Any, x: Tensor) -> Tensor: return self.a(x + x.relu())
# fmt: on


def logits_and_a_bias(self: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    weights = self.a(x).flatten(2) @ tokens.transpose(1, 2)
    weights = weights + self.scale.flatten()
    return (weights.softmax(-1) @ tokens).reshape(x.shape)


def mask(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = self.a(x)
    return x if mask is None else x + mask


def gate_of_the_input(self: Any, x: Tensor) -> Tensor:
    return x * (1 + self.a(x).sigmoid())


@pytest.mark.parametrize(
    'forward',
    [
        parallel_layers,
        position_embedding,
        position_embedding_added_last,
        number,
        size,
        doubled,
        weighted,
        difference,
        broadcast,
        stacked,
        untouched,
        logits_and_a_bias,
        mask,
        gate_of_the_input,
    ],
)
def test_other_sums_are_none(forward: Callable[..., Any]) -> None:
    model = Net(block(forward))
    with pytest.raises(RefusedError, match='no residual add'):
        sem_timm.plan_model(model, target='block', position='residual', input_size=(3, 8, 8))
    if forward not in (stacked, logits_and_a_bias):  # those end in a reshape that hides which axis the channels are on
        # Such a block is not left out: it is taken as a whole.
        assert [s.position for s in sem_timm.plan_model(model, target='block', input_size=(3, 8, 8))] == ['output']
