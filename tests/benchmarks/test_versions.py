"""The page of versions: made of what pytest wrote, of the newest run of each combination."""

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
<testcase name="c"><failure message="assert 1 == 2">...</failure></testcase>
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
    script.main(str(tmp_path / 'results.xml'))
    record = json.loads((tmp_path / 'versions.jsonl').read_text())
    older = {**record, 'torch': '2.3.0+cu121', 'passed': 1000}
    (tmp_path / 'versions.jsonl').write_text(json.dumps(record) + '\n' + json.dumps(older) + '\n')
    script.main(str(tmp_path / 'results.xml'))
    page = (tmp_path / 'versions.md').read_text()
    rows = re.findall(r'^\| 20.*\|$', page, re.MULTILINE)
    assert [row.split(' | ')[2] for row in rows] == ['2.3.0+cu121', record['torch']]  # of two alike, the newer one
    assert [row.split(' | ')[-4:] for row in rows] == [['1,000', '1', '1', '1 |'], ['2', '1', '1', '1 |']]
    assert '- timm 1.0.9 has no test_mambaout: 1 with torch 2.3.0+cu121' in page
