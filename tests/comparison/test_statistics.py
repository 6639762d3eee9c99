"""Intervals and numbers of seeds, against published values."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from sem_timm.comparison.statistics import MOST_SEEDS, compare_pairs, half_width, needed_pairs


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
