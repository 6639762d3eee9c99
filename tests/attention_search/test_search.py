"""Which blocks keep softmax: greedy, on the original, without a trace in the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sem_timm
from sem_timm import ModelError, OptionError, RefusedError
from tests.attention_transfer.small_transformer import batches, create, swapped
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot

DEPTH = 3


def blocks(plan: sem_timm.SearchedPlan) -> list[list[str]]:
    return [list(point.swapped) for point in plan.front]


def test_each_block_is_the_best_of_those_left_and_the_model_stays() -> None:
    model = create(depth=DEPTH)
    before = snapshot(model)
    seen: dict[int, dict[str, float]] = {}

    def look(count: int, name: str, agreement: float) -> None:
        seen.setdefault(count, {})[name] = agreement

    plan = sem_timm.search(model, 'external', batches(), tolerance=0.999, memory=8, progress=look)
    assert_same(before, snapshot(model))
    assert [len(names) for names in blocks(plan)] == [0, 1, 2, 3]
    assert [len(tried) for tried in seen.values()] == [3, 2, 1]
    for count, tried in seen.items():
        best = plan.front[count]
        assert best.agreement == max(tried.values()) == tried[best.swapped[-1]]
        assert best.swapped[:-1] == plan.front[count - 1].swapped
    assert (plan.front[0].agreement, plan.front[0].distance) == (1.0, 0.0)
    base = sem_timm.summary(model).base
    assert (plan.front[0].macs, plan.front[0].activation_bytes) == (base.macs, base.activation_bytes)


def test_the_front_is_what_a_model_patched_so_gives() -> None:
    # Without parameters nothing is drawn, and the plan patches what was measured.
    model, images = create(depth=DEPTH), batches()
    plan = sem_timm.search(model, 'efficient', images, tolerance=0.999, max_batches=2)
    last = plan.front[-1]
    patched = create(depth=DEPTH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(patched, plan.operation, target=list(last.swapped))
        wanted, given = (torch.cat([one(batch) for batch in images[:2]]) for one in (model, patched))
    assert plan.num_images == 32
    assert last.agreement == pytest.approx(float((wanted.argmax(1) == given.argmax(1)).float().mean()))
    now = sem_timm.summary(patched).patched
    assert (last.macs, last.activation_bytes) == (now.macs, now.activation_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, plan)
    assert {part.name for part in sem_timm.patched_modules(model)} == set(last.swapped)


def test_it_stops_at_the_tolerance() -> None:
    model, images = create(depth=DEPTH), batches()
    whole = sem_timm.search(model, 'external', images, tolerance=0.999, memory=8)
    lost = 1 - whole.front[1].agreement
    if whole.front[2].agreement < whole.front[1].agreement:
        assert blocks(sem_timm.search(model, 'external', images, tolerance=lost + 1e-6, memory=8)) == blocks(whole)[:2]


def test_a_tolerance_that_nothing_meets_says_what_would() -> None:
    model = create(depth=DEPTH)
    with refused(model, RefusedError, 'the best, blocks.', 'Give tolerance='):
        sem_timm.search(model, 'external', batches(), tolerance=0, memory=8)


def test_the_front_is_printed_drawn_and_data(tmp_path: Path) -> None:
    plan = sem_timm.search(create(), 'linear', batches(1), tolerance=0.999, own=True)
    assert '(original)' in repr(plan) and 'blocks keep' in repr(plan)
    assert [point['swapped'] for point in plan.to_dict()['front']] == [p.swapped for p in plan.front]
    plan.plot(tmp_path / 'front.png')
    assert (tmp_path / 'front.png').stat().st_size > 1000
    with pytest.raises(OptionError, match='does not end like a picture'):
        plan.plot(tmp_path / 'front.txt')


@pytest.mark.parametrize(
    ('operation', 'options', 'parts'),
    [
        ('external', {'tolerance': 1}, ['tolerance=1', 'from 0 to below 1']),
        ('external', {'tolerance': 'little'}, ["tolerance='little'"]),
        ('external', {'initialize': 1}, ['initialize=True or initialize=False']),
        ('sem', {}, ['sem is no attention']),
        ('external', {'slots': 3}, ["option 'slots'", 'unknown']),
    ],
)
def test_what_cannot_be_searched_for(operation: str, options: dict[str, Any], parts: list[str]) -> None:
    model = create()
    with refused(model, OptionError, *parts):
        sem_timm.search(model, operation, batches(), **options)


def test_images_that_do_not_fit() -> None:
    model = create()
    with refused(model, OptionError, 'yields no images'):
        sem_timm.search(model, 'external', [])
    with refused(model, OptionError, 'input_size=(3, 16, 16)'):
        sem_timm.search(model, 'external', [torch.zeros(2, 3, 16, 16)])
    with refused(model, ModelError, 'infinite or none at all'):
        sem_timm.search(model, 'efficient', [images * float('nan') for images in batches()])


def test_a_model_that_is_swapped_already_has_nothing_to_search() -> None:
    model = swapped()
    with refused(model, RefusedError):
        sem_timm.search(model, 'external', batches())
