"""The example that draws the decisions of the README, with a short training."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.thorough import thorough

EXAMPLE = Path(__file__).parents[1] / 'examples' / 'decisions.py'


@thorough
def test_example_learns_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location('decisions_example', EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with torch.random.fork_rng(devices=[]):
        found = example.main(tmp_path / 'decisions.png', epochs=2)
    assert found.num_images == 898 and len(found.blocks) == 16 and len(found.classes) == 10
    assert (tmp_path / 'decisions.png').stat().st_size > 10_000
    assert 'layer4.2' in capsys.readouterr().out
