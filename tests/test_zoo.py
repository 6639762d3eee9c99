"""A sample of timm's architectures, another one every day; benchmarks/zoo.py checks all of them in the same way."""

from __future__ import annotations

import random
from datetime import date

import pytest

from benchmarks.common.meta import own_architectures
from tests.thorough import first_of_each
from tests.zoo_check import check
from tests.zoo_subject import OPERATIONS, Subject

SMALL = ('atto', 'femto', 'pico', 'nano', 'tiny')

# Every run has the first one, which is no large one if its name can tell.
SAMPLE = sorted(
    random.Random(date.today().isoformat()).sample(own_architectures(), 30),
    key=lambda name: (not any(size in name for size in SMALL), name),
)


@pytest.mark.parametrize('architecture', first_of_each(SAMPLE))
def test_nothing_about_a_model_changes_but_what_should(architecture: str) -> None:
    subject = Subject(architecture)
    results = {operation: check(subject, operation) for operation in OPERATIONS}
    assert results['sem'].sites > 0
    assert not any(result.failed for result in results.values()), results
