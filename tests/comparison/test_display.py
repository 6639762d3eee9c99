"""What a person sees while a comparison goes on."""

from __future__ import annotations

import pytest

from sem_timm.comparison.display import ComparisonDisplay
from sem_timm.comparison.log import RunKey


def test_runs_and_rows_of_other_processes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    key, outcome = RunKey('sem', 0, 0.001), {'outcome': 'finished', 'accuracy': 0.5}
    with ComparisonDisplay(shown=True) as display:
        display.begin(4)
        for num_left in (3, 1, 4, 0):  # one by itself, one of two by itself, four that were added, none of those
            display.finish(key, outcome, num_left)
    told = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ['1/4', '3/4', '4/8', '8/8']
