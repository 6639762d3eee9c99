"""The page of one model on larger and larger images, from rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    return importlib.import_module('attention_sizes')


def row(script: Any, step: str, size: int, ratio: float) -> dict[str, Any]:
    kinds = (script.ORIGINAL, *script.KINDS)
    return {
        'device': 'cpu',
        'size': size,
        'step': step,
        'tokens': (size // 14) ** 2 + 1,
        'seconds': {name: [0.2, 0.1, 1.5] for name in kinds},
        'ratio': {name: 1.0 if name == 'original' else ratio for name in kinds},
        'peak_mib': dict.fromkeys(kinds, 1234.5),
        'date': '2026-01-02',
        'machine': {'processor': 'a processor', 'torch': '2.0', 'threads': 1},
    }


def test_the_page_shows_both_sides_and_tells_where_it_pays(script: Any) -> None:
    rows = [row(script, step, size, ratio) for step in script.STEPS for size, ratio in ((224, 1.25), (448, 0.75))]
    page = script.page(rows)
    assert 'median of 3 calls' in page and 'No GPU was at hand' in page
    assert '| original | 200 ms; 1,234 MiB | 200 ms; 1,234 MiB |' in page
    assert '| external | 200 ms, 1.25 ×; 1,234 MiB | 200 ms, 0.75 ×; 1,234 MiB |' in page
    assert 'in a forward *external* from 1,025 tokens on, *linear* from 1,025 tokens on' in page
    slower = script.page([row(script, step, 224, 1.25) for step in script.STEPS])
    assert 'in a training step *external* at none of these sizes' in slower
