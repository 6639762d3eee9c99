"""What a forward writes in place is written by the swapped one too, whatever name it goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import RefusedError
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import outputs, swap

SIZE = (3, 32, 32)


class Same(sem_timm.AttentionCore):
    """Softmax attention again, so that a swap must change nothing."""

    takes_pairwise_mask = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def after_activation(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    F.relu(q, inplace=True)
    return attend(q, k, v)


def through_a_slice(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    q[:, :, 1:].add_(self.position)
    return attend(q, k, v)


def through_a_view(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = self.q(x)
    wide.view(x.shape[0], x.shape[1], WIDTH).mul_(2)
    return attend(self.heads(wide), k, v)


def by_a_module(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.activation(q[:, :, 1:])
    return attend(q, k, v)


def into_keys(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k.mul_(2)
    return attend(q, k, v)


def after_the_core(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out[:, :, 0].zero_()
    return out


def to_the_input(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    x[:, 0].mul_(0.5)
    return out


def under_another_name(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = self.q(x)
    q = self.heads(wide)
    wide += 1.0  # a tracer sees a sum
    return attend(q, k, v)


def to_a_buffer(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.seen.add_(1)
    return attend(q, k, v)


def to_a_buffer_under_another_name(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = self.seen
    seen += 1
    return attend(q, k, v)


def to_the_input_in_the_end(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x += 1
    return attend(q, k, v)


def to_an_attribute_of_a_child(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.proj.seen += 1
    return attend(q, k, v)


class Attention(Projected):
    how: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(WIDTH // 2))
        self.activation = nn.ReLU(inplace=True)
        self.register_buffer('seen', torch.zeros(()))
        self.proj.seen = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.proj(self.how(x, q, k, v).transpose(1, 2).flatten(2))


def model_with(way: Callable[..., Tensor]) -> nn.Module:
    attention: Any = type(way.__name__, (Attention,), {'how': way})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(attention()).eval()


WAYS = [after_activation, through_a_slice, through_a_view, by_a_module, into_keys, after_the_core]


@pytest.mark.parametrize('way', [*WAYS, to_the_input])
def test_what_is_written_stays(way: Callable[..., Tensor]) -> None:
    model, images = model_with(way), torch.randn(3, *SIZE)
    before = outputs(model, images)
    swap(model, Same, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), before)


def test_what_only_the_old_core_read_is_not_written() -> None:
    plan = sem_timm.plan_model(model_with(into_keys), 'external', input_size=SIZE)
    assert 'mul_' not in plan.code('attention') and 'attention.k.weight' in plan.unread


@pytest.mark.parametrize('operation', ['external', Same])
def test_a_write_that_a_trace_cannot_show_is_refused(operation: Any) -> None:
    with pytest.raises(RefusedError, match='in place'):
        sem_timm.plan_model(model_with(under_another_name), operation, input_size=SIZE)


@pytest.mark.parametrize('way', [to_a_buffer_under_another_name, to_the_input_in_the_end, to_an_attribute_of_a_child])
@pytest.mark.parametrize('operation', ['external', Same])
def test_what_others_would_see_and_a_trace_cannot_show_is_refused(way: Callable[..., Tensor], operation: Any) -> None:
    with pytest.raises(RefusedError, match=r'in another state|it changes self\.proj\.seen'):
        sem_timm.plan_model(model_with(way), operation, input_size=SIZE)


def test_a_swap_leaves_buffers_alone_and_its_forward_does_not() -> None:
    model: Any = swap(model_with(to_a_buffer), 'external', input_size=SIZE)
    assert model.attention.seen == 0
    outputs(model, torch.randn(3, *SIZE))
    assert model.attention.seen == 1
