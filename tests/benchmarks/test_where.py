"""The page of where a gate helps: its numbers are those of its rows, and scores find what is there and no more."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')


def test_the_page_is_that_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / 'page.md'
    monkeypatch.setattr('sys.argv', ['where.py', '--log', str(ROOT / 'docs/where.jsonl'), '--page', str(page)])
    importlib.import_module('where').main()
    assert page.read_text(encoding='utf-8') == (ROOT / 'docs/where.md').read_text(encoding='utf-8')


def test_a_command_is_there_only_if_the_ranking_has_earned_it() -> None:
    page, text = (importlib.import_module(name) for name in ('ranking.page', 'ranking.text'))
    rows = [json.loads(line) for line in (ROOT / 'docs/where.jsonl').read_text(encoding='utf-8').splitlines()]
    choosing, checking = (page.trained(rows, text.MAIN_SETTING, name) for name in (text.CHOOSING, text.CHECKING))
    names = (page.LITERAL, page.best_score(choosing))
    earned = any(page.has_earned_a_command(checking, name) for name in names)
    assert earned == (ROOT / 'sem_timm/command_line/commands/where.py').exists()


def row_of(site: str, loss: float, **values: Any) -> dict[str, Any]:
    return {'setting': 'one', 'set': 'some', 'seed': 0, 'site': site, 'loss': loss, 'parameters': 4, **values}


@pytest.mark.parametrize(('losses', 'earned'), [([2, 8, 1, 5, 3, 7, 4, 6, 0, 9, 5.5], True), (range(11), False)])
def test_the_rule_wants_more_than_depth_tells(losses: Any, earned: bool) -> None:
    page = importlib.import_module('ranking.page')
    sites = [f'block{number:02}' for number in range(11)]
    scores = {'oracle': {site: -float(loss) for site, loss in zip(sites, losses)}}
    rows = [row_of(page.HEAD_ALONE, 5.0), row_of(page.GRADIENTS, 0.0, scores=scores)]
    rows += [row_of(site, float(loss)) for site, loss in zip(sites, losses)]
    found = page.trained(rows, 'one', 'some')
    assert found.gain('validation loss').tolist() == [5.0 - loss for loss in losses]
    assert page.has_earned_a_command(found, 'oracle') is earned


def test_agreement_of_an_order_with_itself_and_its_reverse() -> None:
    statistics = importlib.import_module('ranking.statistics')
    gain = np.array([0.3, 0.1, 0.5, 0.2, 0.4, 0.0])
    same, reverse = statistics.agreement(gain, gain), statistics.agreement(-gain, gain)
    assert (same.spearman, same.kendall, same.of_best) == pytest.approx((1, 1, 1)) and same.p < 0.01
    assert (reverse.spearman, reverse.kendall) == pytest.approx((-1, -1)) and reverse.p > 0.99


def test_a_step_is_judged_on_images_that_it_was_not_made_of() -> None:
    module = importlib.import_module('ranking.scores')
    generator = torch.Generator().manual_seed(0)
    pooled, noise = torch.randn(2, 800, 6, generator=generator).unbind()
    folds = module.fold_of(800)

    def scores(d: torch.Tensor) -> dict[str, float]:
        return module.scores(module.Gradients(d, d, pooled, pooled.relu(), folds))

    name = '{}, gain over spread, held-out head'
    by_noise, by_mean, by_pooled = scores(noise), scores(noise + 0.5), scores(noise + pooled)
    for direction in module.DIRECTIONS:
        assert abs(by_noise[name.format(direction)]) < 0.15
        assert by_mean[name.format(direction)] > 0.4
    assert by_pooled[name.format('ridge')] > 0.4 > 0.15 > abs(by_pooled[name.format('constant')])
