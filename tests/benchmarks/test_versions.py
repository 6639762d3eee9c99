"""The page of versions: made of what pytest wrote, and the same as what pyproject.toml says."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

RESULTS = """<testsuites><testsuite>
<testcase name="a" /><testcase name="b" />
<testcase classname="tests.test_run" name="c"><failure message="assert 1 == 2">...</failure></testcase>
<testcase name="d"><skipped type="pytest.xfail" message="timm's own" /></testcase>
<testcase name="e"><skipped type="pytest.skip" message="timm 1.0.9 has no test_mambaout" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    return importlib.import_module('versions')


def test_page_says_what_each_run_gave(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, 'DOCS', tmp_path)
    (tmp_path / 'results.xml').write_text(RESULTS)
    script.main([str(tmp_path / 'results.xml')])
    record = json.loads((tmp_path / 'versions.jsonl').read_text())
    older = {**record, 'torch': '2.3.0+cu121', 'passed': 1000}
    (tmp_path / 'versions.jsonl').write_text(json.dumps(record) + '\n' + json.dumps(older) + '\n')
    script.main([str(tmp_path / 'results.xml')])
    page = (tmp_path / 'versions.md').read_text()
    rows = re.findall(r'^\| 20.*\|$', page, re.MULTILINE)
    assert [row.split(' | ')[2] for row in rows] == ['2.3.0+cu121', record['torch']]  # of two alike, the newer one
    assert [row.split(' | ')[-4:] for row in rows] == [['1,000', '1', '1', '1 |'], ['2', '1', '1', '1 |']]
    assert '\n| timm has no test_mambaout | 1 | 1 |\n' in page
    assert page.count('`tests.test_run.c`') == 2 and f'- torch 2.3.0, timm {record["timm"]}, Python ' in page


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / 'docs' / 'versions.jsonl').read_text().splitlines()]


def test_floors_and_classifiers_are_what_passed(script: Any) -> None:
    newest = {tuple(script.order(run[name]) for name in ('torch', 'timm', 'python')): run for run in runs()}
    passed = [run for run in newest.values() if not run.get('failed')]
    text = (ROOT / 'pyproject.toml').read_text()
    for package in ('torch', 'timm'):
        (floor,) = re.findall(rf'^    "{package}>=([\d.]+)"', text, re.MULTILINE)
        oldest = min((run[package] for run in passed), key=script.order)
        assert script.order(oldest)[: floor.count('.') + 1] == script.order(floor)
    pythons = {'.'.join(run['python'].split('.')[:2]) for run in passed}
    assert set(re.findall(r'Python :: (3\.\d+)', text)) == pythons
    (floor,) = re.findall(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE)
    assert floor == min(pythons, key=script.order)


def test_page_is_made_of_the_log(script: Any) -> None:
    assert (ROOT / 'docs' / 'versions.md').read_text() == script.page(runs())


def test_matrix_of_the_script_begins_at_the_floors() -> None:
    text = (ROOT / 'pyproject.toml').read_text()
    (row,) = re.findall(r"^    'oldest: ([^']*)'", (ROOT / 'benchmarks' / 'compat.sh').read_text(), re.MULTILINE)
    python, torch, _, timm, _ = row.split()
    assert f'requires-python = ">={python}"' in text and f'"timm>={timm.removeprefix("==")}"' in text
    (floor,) = re.findall(r'"torch>=([\d.]+)"', text)
    assert torch.startswith(f'=={floor}.')
