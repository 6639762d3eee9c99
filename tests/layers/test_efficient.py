"""Efficient and linear attention against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.efficient import EfficientAttention, LinearAttention
from tests.layers.attention_inputs import both_modes, close, inputs, without_tokens

SIZES = [(1, 1, 1, 2, 1), (2, 7, 7, 5, 3), (3, 35, 11, 8, 8), (1, 13, 197, 3, 9)]


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of queries over channels, of keys over tokens."""
    queries = torch.exp(q) / torch.exp(q).sum(-1, keepdim=True)
    keys = torch.exp(k) / torch.exp(k).sum(-2, keepdim=True)
    return torch.einsum('...nd,...md,...mv->...nv', queries, keys, v)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All pairs of queries and keys, one weight 1 + q . k each."""
    q, k = q / q.square().sum(-1, keepdim=True).sqrt(), k / k.square().sum(-1, keepdim=True).sqrt()
    weights = 1 + torch.einsum('...nd,...md->...nm', q, k)
    # The small number belongs to the sum of the keys.
    total = weights.sum(-1, keepdim=True) + 1e-6 * q.sum(-1, keepdim=True)
    return torch.einsum('...nm,...mv->...nv', weights, v) / total


FORMULAS = [(EfficientAttention, efficient), (LinearAttention, linear)]


@pytest.mark.parametrize(('kind', 'formula'), FORMULAS)
@pytest.mark.parametrize(('batch', 'queries', 'keys', 'width', 'value'), SIZES)
@pytest.mark.parametrize('heads', [(), (3,), (3, 2)])
def test_output_follows_the_published_equations(
    kind: type[AttentionCore], formula, batch: int, queries: int, keys: int, width: int, value: int, heads: tuple
) -> None:
    core = kind(width, value)
    arguments = inputs(core, batch, *heads, queries=queries, keys=keys)
    for out in both_modes(lambda: core(*arguments)):
        close(out, formula(*arguments))


@pytest.mark.parametrize(('kind', 'formula'), FORMULAS)
def test_grids_of_any_shape_give_the_result_of_their_tokens(kind: type[AttentionCore], formula) -> None:
    core = kind(6, 4)
    q, k, v = (torch.randn(2, width, 3, 7, dtype=torch.float64) for width in (6, 6, 4))
    tokens = [x.flatten(2).mT for x in (q, k, v)]
    turned = [x.mT.flatten(2).mT for x in (q, k, v)]
    close(core(*tokens), formula(*tokens))
    close(core(*turned).mT.unflatten(2, (7, 3)).mT, core(*tokens).mT.unflatten(2, (3, 7)))


@pytest.mark.parametrize(('kind', 'formula'), FORMULAS)
def test_masked_keys_are_as_good_as_absent(kind: type[AttentionCore], formula) -> None:
    core = kind(5, 3)
    q, k, v = inputs(core, 3, 2, queries=6, keys=9)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    expected = formula(q, *without_tokens(keep, k, v))
    for mask in (keep, torch.zeros(9, dtype=torch.float64).masked_fill(~keep, -torch.inf)):
        for out in both_modes(lambda mask=mask: core(q, k, v, attn_mask=mask)):
            close(out, expected)


@pytest.mark.parametrize(('kind', 'formula'), FORMULAS)
def test_what_is_added_to_a_logit_multiplies_a_weight(kind: type[AttentionCore], formula) -> None:
    core = kind(5, 3)
    q, k, v = inputs(core, 2, queries=6, keys=3)
    # A key that counts twice is a key that is there twice.
    mask = torch.tensor([0.0, torch.tensor(2.0).log(), 0.0], dtype=torch.float64)
    twice = [x[:, [0, 1, 1, 2]] for x in (k, v)]
    torch.testing.assert_close(core(q, k, v, attn_mask=mask), formula(q, *twice), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('kind', [EfficientAttention, LinearAttention])
def test_keys_of_one_head_serve_all_queries(kind: type[AttentionCore]) -> None:
    core = kind(5, 3)
    q, k, v = inputs(core, 2, 4, queries=6)
    for mask in (None, torch.rand(2, 4, 1, 6) < 0.7):
        expected = core(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), attn_mask=mask)
        close(core(q, k[:, :1], v[:, :1], attn_mask=mask), expected)


@pytest.mark.parametrize('kind', [EfficientAttention, LinearAttention])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_sums_over_many_tokens_do_not_overflow(kind: type[AttentionCore], dtype: torch.dtype, autocast: bool) -> None:
    core = kind(4, 2)
    q, k = (torch.full((1, 60_000, 4), 3.0, dtype=torch.float32 if autocast else dtype) for _ in range(2))
    v = torch.full((1, 60_000, 2), 5.0, dtype=q.dtype)
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        out = core(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.full_like(out, 5.0).double(), rtol=0.02, atol=0)


def test_zero_vectors_have_no_direction() -> None:
    core = LinearAttention(4, 2)
    q, k, v = inputs(core, 2, queries=5)
    none = torch.zeros_like(q)
    average = v.mean(-2, keepdim=True).expand(2, 5, 2)
    close(core(none, k, v), average)
    close(core(q, none, v) * (1 + 1e-6 * (q / q.norm(dim=-1, keepdim=True)).sum(-1, keepdim=True) / 5), average)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('keys', [1, 7, 300])
@pytest.mark.parametrize('masked', [False, True])
def test_queries_that_all_keys_point_away_from_give_numbers_like_values(
    dtype: torch.dtype, keys: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    core = LinearAttention(16, 8)
    key = torch.randn(20, 1, 16, generator=generator).to(dtype)
    q, k = -3 * key, key.expand(-1, keys, -1)
    v = torch.randn(20, keys, 8, generator=generator).to(dtype)
    mask = torch.ones(20, 1, keys, dtype=torch.bool) if masked else None
    for out in both_modes(lambda: core(q, k, v, attn_mask=mask)):
        assert torch.isfinite(out).all() and out.abs().max() <= v.abs().max()
    q.requires_grad_()
    core(q, k, v, attn_mask=mask).sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()


def test_they_have_no_parameters_and_write_into_no_input() -> None:
    for kind in (EfficientAttention, LinearAttention):
        core = kind(5, 3, 2)
        assert not list(core.parameters())
        arguments = inputs(core, 3, 2, queries=6)
        before = [x.clone() for x in arguments]
        with torch.inference_mode():
            core(*arguments)
            core(*arguments, attn_mask=torch.zeros(3, 1, 1, 6))
        assert all(torch.equal(x, y) for x, y in zip(arguments, before))
