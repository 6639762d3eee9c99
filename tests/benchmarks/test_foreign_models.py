"""The table of models that are not timm's, for what every run has of them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_rows_of_the_page_are_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    script = importlib.import_module('foreign_models')
    names = ['VisionTransformer', 'SwinTransformer', 'vgg11_bn']
    written = re.findall(
        r'^\| ([^|]+) \| (\d+|–) \|[^|]*\| (\d+|–) \|', (ROOT / 'docs/foreign_models.md').read_text(), re.M
    )
    rows = {name: counts for name, *counts in written if name in names}
    assert len(written) == len(script.SUBJECTS)
    for subject, outcomes in script.plan_all(names):
        assert rows[subject.name] == [str(outcome.sites or '–') for outcome in outcomes.values()]
