"""Masks that a module makes or is given, beside biases and in the ways that masks are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import RefusedError
from tests.refusals import refused
from tests.swap.classes import CLASSES
from tests.swap.small_attention import Model, Projected
from tests.swap.swapping import outputs, swap
from tests.swap.test_core_scale import PlainAttention
from tests.versions import Attention

SIZE, TOKENS = (3, 32, 32), 16
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


class Fixed(Projected):
    """Causal by a buffer, or by a mask it makes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.register_buffer('seen', CAUSAL)
        self.register_buffer('added', torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, float('-inf')))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.form == 'call':
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)
        if self.form == 'call_additive':
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.added)
        logits = q @ k.mT * 0.35
        if self.form == 'filled':
            logits = logits.masked_fill(~self.seen, float('-inf'))
        elif self.form == 'filled_where_zero':
            logits = logits.masked_fill(self.seen[: q.shape[2], : q.shape[2]] == 0, -1e9)
        elif self.form == 'where':
            logits = torch.where(self.seen, logits, float('-inf'))
        elif self.form == 'subtracted':
            logits = logits - 1e9 * ~self.seen
        else:
            logits = logits + torch.full((TOKENS, TOKENS), -1e9, device=q.device).triu(1)
        return logits.softmax(-1) @ v


FORMS = ('call', 'call_additive', 'filled', 'filled_where_zero', 'where', 'subtracted', 'made')


@pytest.mark.parametrize('form', FORMS)
def test_fixed_masks_are_handed_on_or_refused(form: str) -> None:
    model, images = Model(Fixed(form)).eval(), torch.randn(2, *SIZE)
    for operation in ('external', 'halo', 'monarch', 'efficient'):
        with refused(
            model, RefusedError, f'a fixed mask (16, 16) for pairs of tokens, which {operation} cannot honour'
        ):
            sem_timm.patch_model(model, operation, input_size=SIZE)
    expected = outputs(model, images)
    (site,) = sem_timm.plan_model(model, 'catt', input_size=SIZE)
    assert site.masked
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)


class Outer(nn.Module):
    """Gives timm's attention the causal mask of the model, or calls it as causal."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.inner = Attention(TOKENS, num_heads=2)
        self.kwargs = kwargs
        self.register_buffer('seen', CAUSAL)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **(self.kwargs or {'attn_mask': self.seen[: x.shape[1], : x.shape[1]]}))


def test_a_fixed_mask_of_the_model() -> None:
    model, images = Model(Outer()).eval(), torch.randn(2, *SIZE)
    with refused(model, RefusedError, 'attention.inner: it has a fixed mask (16, 16)'):
        sem_timm.patch_model(model, 'external', input_size=SIZE)
    expected = outputs(model, images)
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)


class Making(nn.Module):
    """Makes a mask, or a bias, for the module in it."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.inner = Attention(TOKENS, num_heads=2)
        self.table = nn.Parameter(torch.randn(TOKENS, TOKENS))
        self.learned = learned

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        hidden = torch.full((n, n), float('-inf'), device=x.device).triu(1)
        return self.inner(x, attn_mask=2 * self.table if self.learned else hidden)


def test_a_mask_that_the_parent_makes_is_none_of_its_biases() -> None:
    model, images = Model(Making(learned=False)).eval(), torch.randn(2, *SIZE)
    with refused(model, RefusedError, 'attention.inner: it has a fixed mask (16, 16)'):
        sem_timm.patch_model(model, 'external', input_size=SIZE)
    expected = outputs(model, images)
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)
    for operation in ('external', PlainAttention):
        (site,) = sem_timm.plan_model(Model(Making(learned=True)), operation, input_size=SIZE)
        assert not site.masked


@pytest.mark.parametrize('operation', ['external', 'catt', 'eamlp'])
def test_an_argument_that_makes_a_call_causal(operation: str) -> None:
    model = Model(Outer(is_causal=True))
    with refused(model, RefusedError, 'attention.inner: its attention is causal'):
        sem_timm.patch_model(model, operation, input_size=SIZE)


@pytest.mark.parametrize('operation', ['external', 'caam'])
def test_masks_of_shifted_windows_and_biases_go_with_the_old_core(operation: str) -> None:
    for name in ('models.swin_transformer.WindowAttention', 'models.swin_transformer_v2.WindowAttention'):
        family = CLASSES[name]
        model = family.create(strict_img_size=True)
        assert model.layers[0].blocks[1].attn_mask is not None
        plan = sem_timm.plan_model(model, operation)
        assert len(plan) == 4 and not any(site.masked for site in plan) and not plan.refusals


class Given(Projected):
    """Adds a bias of its own and masks that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TOKENS, TOKENS))

    def forward(self, x: Tensor, mask: Tensor, other: Tensor | None = None, left_out: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        logits = q @ k.mT * 8**-0.5 + self.bias
        logits = logits + mask
        if other is not None:
            logits = logits + other
        if left_out is not None:
            logits = logits.masked_fill(left_out, float('-inf'))
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Giving(nn.Module):
    """Gives masks that depend on the input."""

    def __init__(self, several: bool = False, left_out: bool = False) -> None:
        super().__init__()
        self.inner = Given() if not left_out else LeftOut()
        self.several = several

    def forward(self, x: Tensor) -> Tensor:
        mask = x.mean(-1)[:, None, None, :]
        if isinstance(self.inner, LeftOut):
            return self.inner(x, mask > 0)
        return self.inner(x, mask, mask if self.several else None)


class LeftOut(Projected):
    """Masks tokens that it is told to leave out."""

    def forward(self, x: Tensor, left_out: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        logits = (q @ k.mT * 8**-0.5).masked_fill(left_out, float('-inf'))
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('left_out', [False, True])
def test_a_given_mask_is_handed_on_beside_a_bias_and_by_the_convention_of_the_new_core(left_out: bool) -> None:
    model, images = Model(Giving(left_out=left_out)).eval(), torch.randn(2, *SIZE)
    (site,) = sem_timm.plan_model(model, 'external', input_size=SIZE)
    assert site.masked
    expected = outputs(model, images)
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-5)


def test_several_given_masks_are_refused() -> None:
    model = Model(Giving(several=True))
    for operation in ('external', 'catt'):
        with refused(model, RefusedError, f'it applies 2 masks; {operation} takes one'):
            sem_timm.patch_model(model, operation, input_size=SIZE)


def test_the_original_tells_the_mask_that_is_handed_on() -> None:
    tokens, mask = torch.randn(2, TOKENS, TOKENS), torch.randn(2, 1, 1, TOKENS)
    for left_out, arguments in (
        (False, {'mask': mask, 'other': None, 'left_out': None}),
        (True, {'left_out': mask > 0}),
    ):
        model: Any = Model(Giving(left_out=left_out)).eval()
        plan = sem_timm.plan_model(model, 'external', input_size=SIZE)
        original = plan.originals['attention.inner']
        computed = original.compute(model.attention.inner, {'x': tokens, **arguments}, with_extra=['core'])
        assert torch.equal(computed['core'].extra, ~(mask > 0) if left_out else mask)
