"""Any order of patching, undoing, saving, loading, copying, casting and training: never half-patched, always undone."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.robustness.patched_model import PatchedModel
from tests.thorough import first_of_each


def _run(examples: int, steps: int, *, derandomize: bool) -> None:
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(PatchedModel, settings=options)


@pytest.mark.parametrize('examples', first_of_each([8, 40]))
def test_any_order_of_calls(examples: int) -> None:
    _run(examples, 15, derandomize=True)


@pytest.mark.slow
def test_any_order_of_calls_at_length() -> None:
    _run(300, 30, derandomize=False)
