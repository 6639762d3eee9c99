"""Random residual networks, patched: they compute what they computed, bit for bit, or they are refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.robustness.network_check import OPERATIONS, check_network
from tests.robustness.network_source import describe, random_network
from tests.thorough import first_of_each


def few(examples: int) -> settings:
    """The same examples in every run; benchmarks/random_networks.py draws others."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


@pytest.mark.parametrize('examples', first_of_each([15, 60]))
def test_a_patched_network_is_its_base_or_refused(examples: int) -> None:
    @few(examples)
    @given(st.randoms(use_true_random=False), st.sampled_from(sorted(OPERATIONS)))
    def check(draw: random.Random, operation: str) -> None:
        network = random_network(draw)
        note(describe(network))
        check_network(network, OPERATIONS[operation])

    check()


def test_numbers_stand_for_networks() -> None:
    assert random_network(random.Random(7)).source == random_network(random.Random(7)).source
    kinds = [check_network(random_network(random.Random(number)), OPERATIONS['sem']).kind for number in range(12)]
    assert kinds.count('patched') > 6 and set(kinds) <= {'patched', 'refused', 'invalid'}
