"""Softmax attention in spellings that timm has none of, and what is said of those that are not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import RefusedError
from tests.lively import lively
from tests.refusals import refused
from tests.swap.small_attention import Model, Projected
from tests.swap.swapping import outputs, swap
from tests.swap.test_core_scale import PlainAttention

SIZE = (3, 32, 32)


class RotatedHalves(Projected):
    """Rotary embeddings of the first half of the channels with the second, by angles that the forward computes."""

    def rotated(self, t: Tensor) -> Tensor:
        tokens, width = t.shape[-2:]
        rates = 100.0 ** (-torch.arange(0, width, 2, device=t.device).float() / width)
        angles = torch.outer(torch.arange(tokens, device=t.device).float(), rates)
        first, second = t.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)


class RotatedPairs(Projected):
    """Rotary embeddings of neighbouring channels, made on the CPU as if there were nothing else."""

    def rotated(self, t: Tensor) -> Tensor:
        angles = torch.arange(t.shape[-2])[:, None] * torch.exp(torch.arange(0, 4) * -0.3)
        even, odd, cos, sin = t[..., ::2], t[..., 1::2], angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.rotated(q) @ self.rotated(k).mT * 0.35).softmax(-1) @ v


class KeysTimesQueries(Projected):
    """The product the other way round."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (k @ q.mT * 0.35).softmax(dim=-2).mT @ v


class ValuesTimesWeights(Projected):
    """The product the other way round, and so is that with the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ F.softmax(0.35 * k @ q.transpose(-2, -1), dim=2)).mT


@pytest.mark.parametrize('attention', [RotatedHalves, RotatedPairs, KeysTimesQueries, ValuesTimesWeights])
def test_is_read(attention: type[nn.Module]) -> None:
    model, images = lively(Model(attention())).eval(), torch.randn(2, *SIZE)
    (site,) = sem_timm.plan_model(model, 'external', input_size=SIZE)
    assert (site.num_heads, site.shape) == (2, (2, 2, 16, 8))
    expected = outputs(model, images)
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 40))


class OverQueries(Projected):
    """Every key has weights of its own over the queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(dim=-2) @ v


class KeysTimesQueriesWithBias(Projected):
    """The product the other way round, with more than a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(16, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (k @ q.mT + self.bias).softmax(dim=-2).mT @ v


class AddedByTheProduct(Projected):
    """Product and bias in one call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, bias = q.flatten(0, 1), k.flatten(0, 1), q.new_zeros(1)
        return torch.baddbmm(bias, q, k.mT).softmax(-1).unflatten(0, (-1, 2)) @ v


@pytest.mark.parametrize(
    ('attention', 'reason'),
    [
        (OverQueries, 'its softmax is not over the keys'),
        (KeysTimesQueriesWithBias, 'its keys are multiplied by its queries, and not the other way round'),
        (AddedByTheProduct, 'its products are written with baddbmm, which is not read'),
    ],
)
def test_is_refused_for_what_it_is(attention: type[nn.Module], reason: str) -> None:
    model = Model(attention())
    with refused(model, RefusedError, reason):
        sem_timm.plan_model(model, 'external', input_size=SIZE)


class CausalHeadsThatTalk(Projected):
    """Weights of each head go into others, so that the attention is not read, and a token sees those before it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.mix, self.causal = nn.Conv2d(2, 2, 1), causal

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.mix(q @ k.mT)
        if self.causal:
            logits = logits + torch.full_like(logits, float('-inf')).triu(1)
        return logits.softmax(-1) @ v


def test_a_module_that_is_replaced_unread_is_tried_in_numbers() -> None:
    causal, other = Model(CausalHeadsThatTalk(causal=True)), Model(CausalHeadsThatTalk(causal=False))
    with refused(causal, RefusedError, 'its attention is causal: a token sees only those before it'):
        sem_timm.plan_model(causal, 'eamlp', input_size=SIZE)
    assert len(sem_timm.plan_model(other, 'eamlp', input_size=SIZE)) == 1


def test_a_table_in_a_module_that_is_replaced_unread_may_be_a_mask() -> None:
    model: Any = Model(CausalHeadsThatTalk(causal=False))
    model.attention.register_buffer('seen', torch.ones(16, 16, dtype=torch.bool))
    with refused(model, RefusedError, 'its attention is not read, and a tensor (16, 16) in it may be a mask'):
        sem_timm.plan_model(model, 'eamlp', input_size=SIZE)
