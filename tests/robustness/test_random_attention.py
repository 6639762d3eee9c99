"""Random attention modules, swapped: the rest computes what it computed, or the swap is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from tests.robustness.attention_check import Softmax, check_attention
from tests.robustness.attention_source import random_attention
from tests.robustness.network_source import describe
from tests.robustness.test_random_networks import few
from tests.thorough import first_of_each


@pytest.mark.parametrize(
    ('operation', 'examples'),
    first_of_each([(Softmax, 15), (Softmax, 60), ('external', 60), ('linear', 60), ('eamlp', 60)]),
)
def test_a_swap_changes_the_attention_alone_or_is_refused(operation: Any, examples: int) -> None:
    @few(examples)
    @given(st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        drawn = random_attention(draw)
        note(describe(drawn.network))
        check_attention(drawn, operation)

    check()


def test_most_attention_can_be_swapped() -> None:
    kinds = [check_attention(random_attention(random.Random(number)), Softmax).kind for number in range(20)]
    assert kinds.count('patched') > 8
