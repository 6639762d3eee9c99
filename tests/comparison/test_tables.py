"""Tables and sentences, from results that are made up."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sem_timm.comparison import ComparisonResult, Row
from sem_timm.comparison.log import Record, RunKey
from sem_timm.comparison.picture import draw
from sem_timm.comparison.result import row_results
from sem_timm.comparison.runs import Search, chosen_lr
from sem_timm.comparison.tables import as_csv, as_latex, as_markdown

LR = 0.001


def run(accuracy: float | None) -> dict[str, Any]:
    if accuracy is None:
        return {'outcome': 'diverged', 'reason': 'the loss is nan at step 3'}
    return {'outcome': 'finished', 'accuracy': accuracy, 'loss': 1 - accuracy}


def made(accuracies: Mapping[str, list[float | None]], num_images: int = 1000, **given: Any) -> ComparisonResult:
    record = Record({})
    for name, values in accuracies.items():
        record.rows[name] = Row(name=name, operation='none')
        record.runs.update({RunKey(name, seed, LR): run(value) for seed, value in enumerate(values)})
    rows = row_results(record, None, LR, next(iter(accuracies)), num_images)
    told = {'model': 'resnet_18', 'data': 'a|b', 'num_classes': 3, 'epochs': 2, 'lr': LR}
    return ComparisonResult(tuple(rows), next(iter(accuracies)), Path('there'), told, (100, num_images), **given)


def test_sentences_tell_what_can_be_told() -> None:
    result = made(
        {
            'none': [0.70, 0.72, 0.71, 0.73],
            'better': [0.75, 0.772, 0.758, 0.78],
            'worse': [0.60, 0.62, 0.61, 0.63],
            'alike': [0.70, 0.75, 0.70, 0.74],
            'same': [0.70, 0.72, 0.71, 0.73],
        }
    )
    told = result.conclusions
    assert told[0].startswith('better is better than none: +5.00 points, 95 % interval +4.')
    assert told[1].startswith('worse is worse than none: −10.00 points, 95 % interval −10.0')
    assert told[2].startswith('alike cannot be told apart from none: +0.75 points, 95 % interval −')
    needed = result.difference('alike', 'none').needed
    assert (
        needed is not None
        and f'takes about {needed} seeds, {needed - 4} more, to show four times out of five' in told[2]
    )
    assert told[3].endswith('4 seeds. There is no difference that more seeds would show.')
    assert told[4] == (
        'The highest mean is that of better, told apart from none, worse, alike, same. As it is the highest of 5, this '
        "asks for more than an interval without zero: Holm's procedure."
    )
    assert 'with 4 of them, at least one is wrong in up to 19% of such tables' in told[5]
    assert 'on these 1,000 validation images' in told[6] and '±1.4 points' in told[6]


def test_rows_that_are_level_have_no_highest_among_them() -> None:
    told = made({'none': [0.5, 0.5], 'sem': [0.6, 0.7], 'se': [0.7, 0.6]}).conclusions
    assert 'The highest mean is the same for sem and se.' in told
    assert not any(sentence.startswith('The highest mean is that of') for sentence in told)


def test_runs_that_diverged_are_in_no_mean_and_in_no_pair() -> None:
    result = made({'none': [0.5, 0.6, None], 'sem': [0.6, None, 0.9]})
    row = result['sem']
    assert row.mean == 0.75 and sorted(row.accuracies) == [0, 2]
    assert row.difference is not None and row.difference.num_pairs == 1
    assert '2 of 3' in result.table()
    assert any(
        told.startswith('sem diverged in 1 of 3 runs, which are in no mean: seed 1, the loss is')
        for told in result.conclusions
    )


def test_a_search_takes_the_best_try_that_did_not_diverge_with_any_seed() -> None:
    search = Search((0.1, 1.0, 10.0), (0, 1), 0.2)
    record = Record({}, rows={'none': Row()})
    tries = {0.1: (0.5, 0.6), 1.0: (0.5, 0.7), 10.0: (0.9, None)}
    for rate, values in tries.items():
        for seed, value in enumerate(values):
            assert chosen_lr(record, search, LR, 'none') is None
            record.runs[RunKey('none', seed, rate, True)] = run(value)
    assert chosen_lr(record, search, LR, 'none') == 1.0
    assert chosen_lr(record, None, LR, 'none') == LR
    (row,) = row_results(record, search, LR, 'none', 100)
    assert row.diverged_tries == 1 and row.lr == 1.0 and row.mean is None


def test_forms_of_the_table_escape_what_means_something_there(tmp_path: Path) -> None:
    result = made({'none': [0.5, 0.6], 'a_b|c & 100% $x$ #1 {y} \\z ~^': [0.55, 0.65]})
    page, latex = as_markdown(result), as_latex(result)
    (row,) = (line for line in page.splitlines() if line.startswith('| a\\_b'))
    assert row.replace('\\|', '').count('|') == page.splitlines()[4].count('|')
    assert r'a\_b|c \& 100\% \$x\$ \#1 \{y\} \textbackslash{}z \textasciitilde{}\textasciicircum{}' in latex
    assert '−' not in latex and '±' not in latex.split('\n', 1)[1]
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert rows[1]['row'] == 'a_b|c & 100% $x$ #1 {y} \\z ~^' and float(rows[1]['accuracy_seed_0']) == 0.55
    draw(result, tmp_path / 'picture.png')  # to matplotlib a dollar begins a formula
    assert (tmp_path / 'picture.png').stat().st_size > 1000


def test_columns_without_an_entry_are_left_out() -> None:
    header = made({'none': [0.5], 'sem': [0.6]}).table().splitlines()[2]
    assert header.split() == ['row', 'seeds', 'accuracy', 'difference']
