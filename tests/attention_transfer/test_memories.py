"""Memories from data: against written-out formulas, and on families whose attention differs in form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sem_timm
from sem_timm.attention_transfer import initialize_memories
from sem_timm.attention_transfer.least_squares import LeastSquares
from tests.attention_transfer.small_transformer import batches, create, swapped
from tests.families import FAMILIES, Family
from tests.swap.classes import CLASSES
from tests.swap.small_attention import Model, Projected
from tests.swap.swapping import swapped as swapped_family


def test_double_normalisation_is_a_softmax_over_slots_less_what_tokens_share() -> None:
    core = sem_timm.ExternalAttention(8, memory=5)
    q = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    logits = q @ core.mk
    expected = (logits - logits.logsumexp(-2, keepdim=True)).softmax(-1) @ core.mv
    torch.testing.assert_close(core(q), expected)


def test_values_solve_the_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 60, 5, generator=generator)
    outputs = torch.randn(2, 60, 3, generator=generator)
    weights = torch.rand(60, generator=generator) + 0.5
    problem = LeastSquares()
    for rows in (slice(0, 20), slice(20, 60)):
        problem.add(attention[:, rows], outputs[:, rows], weights[rows])
    roots = weights.sqrt().unsqueeze(-1).double()
    expected = torch.linalg.lstsq(attention.double() * roots, outputs.double() * roots).solution
    torch.testing.assert_close(problem.solution(), expected, rtol=1e-3, atol=1e-3)  # the ridge is 1e-5
    missed = ((attention @ expected.float() - outputs) * roots).square().sum((1, 2))
    torch.testing.assert_close(problem.missed(expected), missed, rtol=1e-4, atol=1e-4)


def test_keys_are_centers_of_the_original_keys_at_the_scale_of_its_logits() -> None:
    original, model = create(), swapped()
    images = batches()
    initialize_memories(model, images, keys='keys', sharpness=(1.0,))
    with torch.no_grad():
        tokens = original.norm_pre(original._pos_embed(original.patch_embed(torch.cat(images))))  # type: ignore
        block = original.blocks[0]  # type: ignore[index]
        q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(-1, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    mk = model.blocks[0].attn.core.mk.detach()
    for head in range(2):
        keys = k[:, head].flatten(0, 1)
        centers = mk[head].mT * 16**0.5
        distance = torch.cdist(centers, keys)
        # A center is nearer to its keys than those are to each other, and is a mean of some of them.
        assert float(distance.min(1).values.mean()) < float(torch.pdist(keys).mean())
        assert float(centers.norm(dim=1).max()) < float(keys.norm(dim=1).max())
        ratio = (q[:, head] @ mk[head]).std() / (q[:, head] @ k[:, head].mT / 4).std()
        assert 0.3 < float(ratio) < 1.1


class SpelledOut(Projected):
    """Scales its products, by less than the root of its width would."""

    scale = 0.1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.scale).softmax(-1) @ v


class Called(SpelledOut):
    """The same in one call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class ScaledBefore(SpelledOut):
    """The same by queries that are scaled, which the new core gets so."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.scale) @ k.mT).softmax(-1) @ v


def test_the_scale_of_keys_does_not_depend_on_how_attention_is_written() -> None:
    memories = {}
    for form in (Called, SpelledOut, ScaledBefore):
        torch.manual_seed(0)
        model = swapped(model=Model(form()).eval(), input_size=(3, 32, 32))
        images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
        initialize_memories(model, images, keys='keys', sharpness=(1.0,))
        memories[form] = model.attention.core.mk.detach()
    torch.testing.assert_close(memories[SpelledOut], memories[Called])
    torch.testing.assert_close(memories[ScaledBefore] * SpelledOut.scale, memories[Called])


def test_least_squares_is_better_than_means_and_chosen_sharpness_than_none() -> None:
    errors = {}
    for name, how in {
        'means': {'keys': 'keys', 'values': 'means', 'sharpness': (1.0,)},
        'fitted': {'keys': 'keys', 'sharpness': (1.0,)},
        'chosen': {'keys': 'keys', 'sharpness': (0.5, 1.0, 2.0)},
        'queries': {'keys': 'queries'},
        'swap': {'keys': 'swap'},
    }.items():
        result = initialize_memories(swapped(), batches(), **how)
        errors[name] = result['initialize'].mean_error
    assert errors['means'] > max(errors['fitted'], errors['queries'], errors['swap'])  # type: ignore[type-var]
    # What is best for each head's core is so up to the mixing of heads behind it.
    assert errors['chosen'] < errors['fitted'] + 0.01  # type: ignore[operator]


def test_the_chosen_sharpness_is_told_for_each_head() -> None:
    result = initialize_memories(swapped(), batches(), sharpness=(0.5, 1.0, 2.0))
    chosen = result['initialize'].sharpness
    assert list(chosen) == ['blocks.0.attn.core', 'blocks.1.attn.core']
    assert all(len(heads) == 2 and set(heads) <= {0.5, 1.0, 2.0} for heads in chosen.values())


FORMS: dict[str, Family] = {
    'class and register tokens': FAMILIES['vit_registers'],
    'class and distillation tokens': FAMILIES['deit_distilled'],
    'windows with masks': FAMILIES['swin'],
    'values on the left': CLASSES['models.levit.Attention'],
    'feature maps': CLASSES['layers.attention2d.MultiQueryAttention2d'],
    'spelled out, pooled keys': CLASSES['models.mvitv2.MultiScaleAttention'],
}


@pytest.mark.parametrize('form', list(FORMS))
def test_attention_of_every_form_is_initialised(form: str) -> None:
    family = FORMS[form]
    model = swapped_family(family, memory=4)
    result = sem_timm.transfer(model, [family.images(4)], keys='keys', epochs=2)
    swap, start = result['swap'].mean_error, result['initialize'].mean_error
    assert swap is not None and start is not None and start < swap
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize('options', [{'num_heads': 1}, {'norm': 'softmax'}, {'num_heads': 1, 'norm': 'softmax'}])
def test_shared_memories_and_the_other_norm(options: dict[str, Any]) -> None:
    result = sem_timm.transfer(swapped(**options), batches())
    assert result['initialize'].mean_error < result['swap'].mean_error  # type: ignore[operator]


def test_a_few_of_the_layers_may_be_swapped() -> None:
    model = swapped(target=['blocks.1.attn'])
    result = sem_timm.transfer(model, batches())
    assert list(result['match'].errors) == ['blocks.1.attn']
