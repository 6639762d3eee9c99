"""Intervals and numbers of seeds, against published values."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from scipy.stats import ttest_rel

from sem_timm.comparison.statistics import MOST_SEEDS, compare_pairs, half_width, needed_pairs, told_together


@pytest.mark.parametrize(
    ('number', 'quantile'), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (30, 2.0452), (121, 1.9799)]
)
def test_intervals_have_the_quantiles_of_the_tables_of_t(number: int, quantile: float) -> None:
    assert half_width(1.0, number) * math.sqrt(number) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize(('effect', 'number'), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_numbers_of_pairs_are_those_of_cohens_effects(effect: float, number: int) -> None:
    """As printed for two-sided paired t tests at 5 % with a power of 80 %, such as by G*Power."""
    assert needed_pairs(effect, 1.0) == needed_pairs(-effect, 1.0) == number


def test_differences_of_any_size_have_a_number_or_none() -> None:
    numbers = [needed_pairs(effect / 10, 1.0) for effect in range(1, 80)]
    assert None not in numbers and numbers == sorted(numbers, key=lambda n: -(n or 0))
    assert needed_pairs(1000.0, 1.0) == 2
    assert needed_pairs(0.0, 1.0) is needed_pairs(1e-3, 1.0) is None and MOST_SEEDS == 1000


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    numbers = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02 + 0.01
    held = 0
    for row in numbers.tolist():
        found = compare_pairs('a', 'b', row, [0.0] * 5, 10**9)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.01 <= found.high
    assert held / 4000 == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_pairs_are_what_counts_and_not_the_spread_that_both_share() -> None:
    base = [0.50, 0.70, 0.90]
    better = [0.51, 0.712, 0.908]
    found = compare_pairs('a', 'b', better, base, 1000)
    assert found.is_told and found.mean == pytest.approx(0.01)
    assert found.spread == pytest.approx(statistics.stdev([0.01, 0.012, 0.008]))
    assert not compare_pairs('a', 'b', better, base[::-1], 1000).is_told


def test_seeds_that_agree_to_the_image_are_no_proof() -> None:
    found = compare_pairs('a', 'b', [0.91, 0.81], [0.90, 0.80], 100)
    assert found.spread == pytest.approx(math.sqrt(1 / 6) / 100) and not found.is_told
    assert compare_pairs('a', 'b', [0.91] * 8, [0.90] * 8, 100).is_told


def test_without_two_pairs_there_is_no_interval() -> None:
    one = compare_pairs('a', 'b', [0.9], [0.8], 10)
    assert (one.mean, one.low, one.is_told) == (pytest.approx(0.1), None, False)
    assert compare_pairs('a', 'b', [], [], 10).mean is None


def test_p_values_are_those_of_paired_t_tests() -> None:
    first, second = [0.91, 0.85, 0.88, 0.93], [0.90, 0.80, 0.89, 0.86]
    expected = ttest_rel(first, second).pvalue
    assert compare_pairs('a', 'b', first, second, 10**9).p_value == pytest.approx(expected)
    assert compare_pairs('a', 'b', [0.9], [0.8], 10).p_value == 1.0


def test_many_differences_are_told_together_more_seldom_than_each() -> None:
    """With ten rows that are all the same, the highest is seldom told apart from any."""
    generator = torch.Generator().manual_seed(0)
    each = together = 0
    for _ in range(400):
        rows = (0.9 + 0.01 * torch.randn(10, 5, generator=generator, dtype=torch.float64)).tolist()
        best = max(rows, key=sum)
        found = [compare_pairs('a', 'b', best, row, 10**9) for row in rows if row is not best]
        each += any(one.is_told for one in found)
        together += bool(told_together(found))
    assert each > 200 and together < 0.35 * each
    clear = [compare_pairs('a', 'b', [0.9, 0.91, 0.9], [0.5, 0.51, low], 1000) for low in (0.5, 0.501)]
    assert told_together(clear) == sorted(clear, key=lambda one: one.p_value) and told_together([]) == []
