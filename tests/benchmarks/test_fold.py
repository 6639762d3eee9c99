"""The page of gates and the layers that take them: what it says of an architecture, and that a run goes on."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.versions import since_timm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    return importlib.import_module('fold')


@since_timm('1.0.21', 'test_nfnet that can be built on the meta device')
def test_page_counts_what_is_found(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ['test_resnet', 'test_nfnet', '--json', str(tmp_path / 'log'), '--out', str(tmp_path / 'page.md')]
    script.main(arguments)
    page = (tmp_path / 'page.md').read_text()
    assert 'of 8 gates in 2 architectures 4 (50.0%) have a layer' in page and '| batch norm | 4 | 4 |' in page
    assert '| a value on the way is read by others as well | 4 | 1 | test_nfnet stages.0.0: the argument x in' in page
    monkeypatch.setattr(script, 'look_at', None)  # all that is needed is in the log
    script.main(arguments)
    assert (tmp_path / 'page.md').read_text() == page


def test_an_architecture_that_fails_is_listed(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError('no such thing')

    monkeypatch.setattr(script, 'create_on_meta', fail)
    row = script.look_at('test_resnet')
    assert row.error == 'RuntimeError: no such thing' and row.total == 0
    assert '- test_resnet: RuntimeError: no such thing' in script.report([row], 1.0)


@pytest.mark.parametrize(
    ('reason', 'general'),
    [
        ('the argument x in blocks.0.se is read by others as well', 'a value on the way is read by others as well'),
        ('its block is not read: DenseLayer.forward uses checkpoint', 'its block is not read'),
        ('blocks.1.attn is not read: Attention.forward cannot', '… is not read'),
        ('silu in blocks.0.act does not pass a factor on', 'silu does not pass a factor on'),
        ('blocks.0.mlp is called 3 times', '… is called 3 times'),
        ('it comes out of the method cell_forward of cell_0', 'it comes out of a method of its block'),
    ],
)
def test_reasons_count_together_whatever_the_module(script: Any, reason: str, general: str) -> None:
    assert script._general(reason) == general


def test_the_page_is_of_all_families(script: Any) -> None:
    page = (ROOT / 'docs/zoo_fold.md').read_text(encoding='utf-8')
    (counts,) = re.findall(r'of ([\d,]+) gates in ([\d,]+) architectures ([\d,]+) ', page)
    gates, architectures, placed = (int(count.replace(',', '')) for count in counts)
    rows = re.findall(r'^\| \w+ \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|', page, re.MULTILINE)
    assert sum(int(row[0]) for row in rows) == architectures > 1000
    assert sum(int(row[1].replace(',', '')) for row in rows) == gates
    assert sum(int(row[2].replace(',', '')) for row in rows) == placed
    folded = re.findall(r'^\| [\w +]+ \| ([\d,]+) \| ([\d,]+) \|$', page, re.MULTILINE)
    for column, wanted in enumerate((placed, sum(int(row[3].replace(',', '')) for row in rows))):
        assert sum(int(row[column].replace(',', '')) for row in folded) == wanted > 0
