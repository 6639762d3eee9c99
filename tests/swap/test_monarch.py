"""Monarch attention in every attention class of timm: where it stands for the old attention, and what it says else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sem_timm
from sem_timm import RefusedError
from tests.swap.classes import CLASSES, FORMS, by_form
from tests.swap.swapping import backward, outputs, shapes, swap, swapped, without_gradient
from tests.thorough import first_of_each
from tests.twins import assert_equal

# Why modules cannot take it: no grid for queries and keys alike.
REASONS = ('it needs one grid for both', 'of which height and width are not known', 'are not those of grid_size=')


def largest_difference(model: Any, other: Any, images: torch.Tensor) -> float:
    """Of outputs, as a part of the spread of those of the first."""
    pairs = zip(outputs(model, images), outputs(other, images))
    return max(float((x - y).abs().max() / x.std()) for x, y in pairs)


@pytest.mark.parametrize('name', by_form(CLASSES))
def test_one_block_is_the_old_attention_unless_the_plan_says_what_is_lost(name: str) -> None:
    family = CLASSES[name]
    base = family.create()
    model = copy.deepcopy(base)
    # Double precision, as deep networks with random weights enlarge the rounding of single precision.
    base, model, images = base.double(), model.double(), family.images().double()
    try:
        plan = sem_timm.plan_model(model, 'monarch', block_size=10_000, input_size=family.input_size)
    except RefusedError as error:
        assert any(reason in str(error) for reason in REASONS)
        return
    for refusal in plan.refusals:
        assert any(reason in refusal.reason for reason in REASONS) or refused_by_others(name, refusal)
    swap(model, plan)
    difference = largest_difference(base, model, images)
    assert (difference < 1e-9) == (not plan.losing_terms), (difference, plan.losing_terms)


def refused_by_others(name: str, refusal: sem_timm.Refusal) -> bool:
    """Whether External Attention, which reads neither keys nor a grid, is refused in the same module."""
    family = CLASSES[name]
    plan = sem_timm.plan_model(family.create(), 'external', input_size=family.input_size)
    return any(other.name == refusal.name for other in plan.refusals)


@pytest.mark.parametrize('name', by_form(CLASSES))
def test_default_blocks_in_every_class(name: str) -> None:
    family = CLASSES[name]
    base = family.create()
    model = copy.deepcopy(base)
    try:
        plan = sem_timm.plan_model(model, 'monarch', input_size=family.input_size)
    except RefusedError:
        return
    assert plan.num_parameters == 0
    swap(model, plan)
    backward(model, family.images())
    assert without_gradient(model) == set()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for batch_size in (1, 3):
        assert shapes(model, family.images(batch_size)) == shapes(base, family.images(batch_size))
    if family.other_size is not None:
        images = family.images(1, family.other_size)
        assert shapes(model, images) == shapes(base, images)
    sem_timm.unpatch_model(model)
    assert_equal(outputs(model, family.images()), outputs(base, family.images()))


def test_images_of_another_shape_than_planned() -> None:
    """Squares go by blocks, and where nothing tells height from width, the old attention is computed."""
    base = CLASSES['models.eva.EvaAttention'].create()
    with torch.no_grad():  # as drawn, all tokens are attended to alike, and any blocks will do
        for name, parameter in base.named_parameters():
            parameter.mul_(30 if 'attn' in name and parameter.ndim > 1 else 1)
    model = copy.deepcopy(base)
    swap(model, sem_timm.plan_model(model, 'monarch'))
    for size, is_exact in (((96, 96), False), ((64, 96), True)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        assert (largest_difference(base, model, images) < 1e-5) == is_exact


@pytest.mark.parametrize('name', first_of_each(['windows', 'class token', 'rotary', 'channels first']))
@pytest.mark.parametrize('dtype', first_of_each([torch.bfloat16, torch.float16]))
def test_half_precision_in_models(name: str, dtype: torch.dtype) -> None:
    family = CLASSES[FORMS[name]]
    model = swapped(family, 'monarch')
    for out in outputs(model.to(dtype), family.images(1).to(dtype)):
        assert out.dtype == dtype and out.isfinite().all()
