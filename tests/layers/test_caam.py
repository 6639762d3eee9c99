"""CaaM: both branches and the penalty."""

from __future__ import annotations

import pytest
import torch

from sem_timm.errors import OptionError
from sem_timm.layers.caam import CaaMAttention, invariance_penalty
from tests.layers.attention_inputs import both_modes, close, inputs


@pytest.mark.parametrize(('batch', 'queries', 'keys', 'width', 'value'), [(1, 1, 1, 1, 1), (2, 7, 9, 5, 3)])
@pytest.mark.parametrize('heads', [(), (3,), (3, 2)])
def test_branches_follow_the_published_equations(
    batch: int, queries: int, keys: int, width: int, value: int, heads: tuple[int, ...]
) -> None:
    core = CaaMAttention(width, value)
    q, k, v = inputs(core, batch, *heads, queries=queries, keys=keys)
    scores = torch.einsum('...nd,...md->...nm', q, k) / width**0.5
    expected = []
    for sign in (1, -1):
        weights = torch.exp(sign * scores)
        expected.append(torch.einsum('...nm,...mv->...nv', weights / weights.sum(-1, keepdim=True), v))
    for branch, formula in zip(core.branches(q, k, v), expected):
        close(branch, formula)
    for out in both_modes(lambda: core(q, k, v)):
        close(out, expected[0] + expected[1])


def test_the_mix_is_a_sum_so_that_queries_without_a_choice_get_twice_the_mean_of_values() -> None:
    core = CaaMAttention(5, 3)
    q, k, v = inputs(core, 2, queries=6)
    close(core(0 * q, k, v), 2 * v.mean(-2, keepdim=True).expand(2, 6, 3))


def test_masks_hold_in_both_branches() -> None:
    core = CaaMAttention(5)
    q, k, v = inputs(core, 2, queries=6)
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.randn(6, 6, dtype=torch.float64)
    for mask, added in ((keep, torch.zeros(6, 6).masked_fill(~keep, -torch.inf)), (bias, bias)):
        for sign, branch in zip((1, -1), core.branches(q, k, v, attn_mask=mask)):
            close(branch, torch.softmax(sign * q @ k.mT / 5**0.5 + added, -1) @ v)


def test_penalty_is_the_published_one() -> None:
    weights = [torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]
    mean = sum(weights) / 5
    expected = sum(((w - mean) ** 2).sum() / w.abs().sum() ** 2 for w in weights) / 5
    close(invariance_penalty(weights), expected)
    close(invariance_penalty(torch.stack(weights)), expected)
    close(invariance_penalty([3 * w for w in weights]), expected)


def test_penalty_is_zero_for_equal_weights_and_pulls_others_together() -> None:
    weight = torch.randn(3, 4)
    assert float(invariance_penalty([weight, weight])) == 0
    assert float(invariance_penalty([weight])) == 0
    assert torch.isfinite(invariance_penalty([weight, torch.zeros(3, 4)]))
    pair = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    before = invariance_penalty(pair)
    before.backward()
    with torch.no_grad():
        for parameter in pair:
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert float(invariance_penalty(pair).detach()) < float(before.detach())


@pytest.mark.parametrize('weights', [[], [torch.ones(2), torch.ones(3)]])
def test_weights_that_do_not_match_are_refused(weights: list[torch.Tensor]) -> None:
    with pytest.raises(OptionError, match='one weight per environment, one or more, all of one shape'):
        invariance_penalty(weights)
