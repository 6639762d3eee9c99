"""Terms of the logits: each is a position bias, which goes, or is handed on, or the module is refused; none is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import RefusedError
from tests.lively import lively
from tests.swap.classes import CLASSES, by_form
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import outputs, swap
from tests.swap.test_core_scale import SCALES, PlainAttention, assert_reproduced

SIZE, TOKENS, HEADS = (3, 32, 32), 16, 2
SEEN = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


class Terms(Projected):
    """Attention whose logits get terms of every kind, and the tables and layers that they are made of."""

    term: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.rows = nn.Parameter(torch.randn(HEADS, 2 * TOKENS - 1))
        self.relative = nn.Parameter(torch.randn(TOKENS, WIDTH // HEADS))
        self.importance, self.temperature = nn.Linear(WIDTH // HEADS, 1), nn.Linear(WIDTH, 1)
        self.coordinates = nn.Linear(2, HEADS)
        self.mix, self.drop, self.gain = (
            nn.Conv2d(HEADS, HEADS, 1),
            nn.Dropout(0.5),
            nn.Parameter(torch.rand(HEADS, 1, 1)),
        )
        self.register_buffer('index', torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1)
        self.register_buffer('places', torch.randn(TOKENS, TOKENS, 2))
        self.register_buffer('seen', SEEN)
        self.register_buffer('hidden', torch.zeros(TOKENS, TOKENS).masked_fill(~SEEN, -math.inf))
        self.register_buffer(
            'slopes', torch.rand(HEADS, 1, 1) * -(torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
        )

    def qkv(self, x: Tensor) -> list[Tensor]:
        return [self.heads(layer(x)) for layer in (self.q, self.k, self.v)]


class Spelled(Terms):
    """Product, softmax and product; the term makes logits of logits."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        out = self.term(q @ k.mT * 0.35, q, k, v, x).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Fused(Terms):
    """One call; the term says what it is given beside queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        out = F.scaled_dot_product_attention(q, k, v, scale=0.35, **self.term(q, k, v, x))
        return self.proj(out.transpose(1, 2).flatten(2))


def attention(base: type[Terms], term: Callable[..., Any]) -> Terms:
    """An attention module of a class of its own, as if the term stood in it."""
    return type(base)(term.__name__, (base,), {'term': term})()


def _filled(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)


def _tril(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits.masked_fill(torch.ones_like(logits).tril() == 0, torch.finfo(logits.dtype).min)


def _full(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    n = x.shape[1]
    return logits + torch.triu(torch.full((n, n), -math.inf, device=x.device), diagonal=1)


def _of_sizes(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    n = x.shape[1]
    seen = torch.ones(n, n, device=x.device).tril()
    return logits.masked_fill(seen == 0, -1e9)


def _of_sizes_in_bool(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    n = q.size(-2)
    return torch.where(torch.ones(n, n, dtype=torch.bool, device=x.device).tril(), logits, -math.inf)


def _arange(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], device=x.device)
    return logits.masked_fill(i[:, None] < i[None], -math.inf)


def _where_full(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], device=x.device)
    return torch.where(i[:, None] >= i, logits, torch.full_like(logits, -math.inf))


def _where_zeros(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.where(self.seen, logits, torch.zeros_like(logits))


def _numbers(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + (1.0 - self.seen.float()) * -1e9


def _lowest(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + torch.zeros_like(logits).masked_fill(~self.seen, torch.finfo(logits.dtype).min)


def _triu_of_new(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.table.new_full((TOKENS, TOKENS), -math.inf).triu(1)


def _generated(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + nn.Transformer.generate_square_subsequent_mask(TOKENS, device=x.device)


def _generated_by_size(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)


def _in_place(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    logits.masked_fill_(~self.seen, -math.inf)
    return logits


def _in_place_of_the_mask(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros_like(logits)
    mask.masked_fill_(~self.seen, -math.inf)
    return logits + mask


def _by_index(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    logits[:, :, ~self.seen] = -math.inf
    return logits


def _part_in_place(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    logits[..., 3:].sub_(100.0)
    return logits


def _bias_and_mask(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + (self.table + self.hidden)


def _masked_bias(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.table.masked_fill(~self.seen, -math.inf)


def _mask_then_scale(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (logits + self.slopes) * 0.1


def _negative(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return self.slopes - logits


def _slopes(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.slopes


def _top_k(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits.masked_fill(logits < logits.topk(4, -1).values[..., -1:], -math.inf)


def _top_k_kept(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    least = torch.topk(logits, 4, dim=-1)[0].amin(-1, keepdim=True)
    return torch.where(logits >= least, logits, float('-inf'))


def _top_k_scattered(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    best = logits.topk(4, -1)
    return torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)


def _distances(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return 2 * logits - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[..., None, :]


def _distances_to_the_first(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits - (k - k[:, :, :1]).norm(dim=-1).unsqueeze(-2)


def _pairwise_distances(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits - torch.cdist(x, x)[:, None]


def _importance(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.importance(k).mT


def _importance_of_inputs(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.temperature(x).mT[:, None]


def _importance_by_a_parameter(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + (k @ self.relative[0])[..., None, :]


def _learned_of_queries(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.importance(q).mT


def _times_importance(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits * self.importance(k).mT.sigmoid()


def _temperature(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits / self.temperature(x).exp()[:, None]


def _times_a_mask(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits * self.seen


def _times_a_made_mask(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits * torch.ones_like(logits).tril()


def _talking_heads(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return self.mix(logits)


def _talking_and_masked(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return self.mix(logits).masked_fill(~self.seen, -math.inf)


def _dropped_out(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return self.drop(logits)


def _dropped_out_by_a_call(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return F.dropout(logits, 0.5, self.training)


def _capped(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(logits / 2) * 2


def _clamped(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits.clamp(-0.1, 0.1)


def _clamped_far_out(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True)).clamp(min=-5e4, max=5e4)


def _previous(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + logits.roll(1, -1)


def _of_values(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + q @ v.mT


def _by_function(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return _with_a_mask(logits, self.table)


def _with_a_mask(logits: Tensor, table: Tensor) -> Tensor:
    return logits + table + torch.full(table.shape[-2:], -math.inf, device=logits.device).triu(1)


SPELLED = [
    _filled,
    _tril,
    _full,
    _of_sizes,
    _of_sizes_in_bool,
    _arange,
    _where_full,
    _where_zeros,
    _numbers,
    _lowest,
    _triu_of_new,
    _generated,
    _generated_by_size,
    _in_place,
    _in_place_of_the_mask,
    _by_index,
    _part_in_place,
    _bias_and_mask,
    _masked_bias,
    _mask_then_scale,
    _negative,
    _slopes,
    _top_k,
    _top_k_kept,
    _top_k_scattered,
    _distances,
    _distances_to_the_first,
    _pairwise_distances,
    _importance,
    _importance_of_inputs,
    _importance_by_a_parameter,
    _learned_of_queries,
    _times_importance,
    _temperature,
    _times_a_mask,
    _times_a_made_mask,
    _talking_heads,
    _talking_and_masked,
    _dropped_out,
    _dropped_out_by_a_call,
    _capped,
    _clamped,
    _clamped_far_out,
    _previous,
    _of_values,
    _by_function,
]


def _called_causal(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'is_causal': True}


def _causal_by_length(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'is_causal': x.shape[1] > 1}


def _bool_of_sizes(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    n = x.shape[1]
    return {'attn_mask': torch.ones(n, n, dtype=torch.bool, device=x.device).tril()}


def _bool_like(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': torch.ones_like(q[..., :1] @ k[..., :1].mT).tril().bool()}


def _numbers_like(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': x.new_full((x.shape[1], x.shape[1]), -math.inf).triu(1)}


def _generated_mask(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)}


def _bias_with_mask(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': self.table.masked_fill(~self.seen, -math.inf)}


def _rows_with_mask(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': self.rows[:, self.index] + self.hidden}


def _stored_slopes(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': self.slopes}


def _importance_given(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': self.importance(k).mT}


def _distances_given(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    return {'attn_mask': -torch.cdist(x, x)[:, None]}


def _written_mask(self: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> dict[str, Any]:
    mask = self.rows[:, self.index].clone()
    mask.masked_fill_(~self.seen, -math.inf)
    return {'attn_mask': mask}


FUSED = [
    _called_causal,
    _causal_by_length,
    _bool_of_sizes,
    _bool_like,
    _numbers_like,
    _generated_mask,
    _bias_with_mask,
    _rows_with_mask,
    _stored_slopes,
    _importance_given,
    _distances_given,
    _written_mask,
]


def _table(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.table


def _rows(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.rows[:, self.index]


def _sigmoid_of_rows(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + 16 * torch.sigmoid(
        self.rows.mT[self.index.view(-1)].view(TOKENS, TOKENS, HEADS).permute(2, 0, 1)[None]
    )


def _coordinates(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + self.coordinates(self.places).permute(2, 0, 1)


def _relative(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + torch.einsum('bhnd,md->bhnm', q, self.relative)


def _relative_of_scaled(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return logits + (q * 0.35).flatten(0, 1).matmul(self.relative.mT).view_as(logits)


def _before_the_scale(self: Any, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (logits + self.table) * 0.5


# Position biases, with the parameters that they are made of.
POSITIONS = {
    _table: 'table',
    _rows: 'rows',
    _sigmoid_of_rows: 'rows',
    _coordinates: 'coordinates',
    _relative: 'relative',
    _relative_of_scaled: 'relative',
    _before_the_scale: 'table',
}


def without_term(base: type[Terms]) -> Callable[..., Any]:
    def none(self: Any, *inputs: Tensor) -> Any:
        return inputs[0] if base is Spelled else {}

    return none


def models(base: type[Terms], term: Callable[..., Any]) -> tuple[nn.Module, nn.Module]:
    """A model with a term in its logits, and the same model without."""
    model, other = (lively(Model(attention(base, each))).eval() for each in (term, without_term(base)))
    if term is _by_function:  # what else it adds may go
        nn.init.zeros_(model.attention.table)
    other.load_state_dict(model.state_dict())
    return model, other


# Of these an output in eval mode shows nothing.
UNSEEN = (_clamped_far_out, _dropped_out, _dropped_out_by_a_call)

CASES = [*((Spelled, term) for term in SPELLED), *((Fused, term) for term in FUSED)]
NAMES = [f'{base.__name__}{term.__name__}' for base, term in CASES]


@pytest.mark.parametrize(('base', 'term'), CASES, ids=NAMES)
def test_what_goes_into_the_logits_is_handed_on_or_refused(base: type[Terms], term: Callable[..., Any]) -> None:
    model, other = models(base, term)
    images = torch.randn(2, *SIZE)
    expected, without = outputs(model, images), outputs(other, images)
    assert term in UNSEEN or not torch.allclose(expected[0], without[0], atol=1e-3, equal_nan=True)
    for operation in ('external', 'eamlp'):
        try:
            plan = sem_timm.plan_model(model, operation, input_size=SIZE)
        except RefusedError as refusal:
            assert 'attention: ' in str(refusal)
        else:
            assert plan.sites[0].masked or term is _clamped_far_out
    try:
        plan = sem_timm.plan_model(model, PlainAttention, input_size=SIZE)
    except RefusedError as refusal:
        assert 'attention: ' in str(refusal)
    else:
        swap(model, plan)
        torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('term', POSITIONS, ids=lambda term: term.__name__)
def test_position_biases_go(term: Callable[..., Any]) -> None:
    model, other = models(Spelled, term)
    images = torch.randn(2, *SIZE)
    for operation in ('external', 'eamlp'):
        (site,) = sem_timm.plan_model(model, operation, input_size=SIZE)
        assert not site.masked
    if term is not _before_the_scale:
        biased = outputs(model, images)
        assert not torch.allclose(biased[0], outputs(other, images)[0], atol=1e-3)
    bias = getattr(model.attention, POSITIONS[term])
    for parameter in bias.parameters() if isinstance(bias, nn.Module) else (bias,):
        nn.init.zeros_(parameter)
    expected = outputs(model, images)
    swap(model, PlainAttention, input_size=SIZE)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', by_form(name for name in CLASSES if name not in SCALES))
def test_in_attentions_of_timm_nothing_goes_but_biases_and_masks_of_windows(name: str) -> None:
    assert_reproduced(CLASSES[name])
