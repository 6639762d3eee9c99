"""Runs all cells of the matrix of timm's and torch's API, not only those of every run, and writes what came out.

    python benchmarks/compatibility.py
    python benchmarks/compatibility.py -k 'onnx or distributed'

Needs `pip install -e '.[dev]'` and a C compiler. All cells take about an hour on one core. What was run is kept in
build/compatibility.json, so that a run of a part, chosen by arguments for pytest, adds to the page; the page is written
when there is an outcome for every cell. With --again, nothing is taken from former runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'compatibility.md'
KEPT = ROOT / 'build' / 'compatibility.json'
PACKAGES = ('torch', 'torchvision', 'timm', 'onnx', 'onnxruntime')


class Recorder:
    """A plugin of pytest that keeps the outcome of each cell, at once, so that nothing is lost to a kill."""

    def __init__(self, outcomes: dict[str, str]) -> None:
        self.outcomes = outcomes

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition('::test_')[2]
        if '[' not in name or (report.when != 'call' and report.passed):
            return
        failed_as_expected = hasattr(report, 'wasxfail') and report.skipped
        self.outcomes[name] = 'xfailed' if failed_as_expected else report.outcome
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(self.outcomes, indent=1, ensure_ascii=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--again', action='store_true', help='forget the outcomes of former runs')
    parser.add_argument('--page-only', action='store_true', help='run nothing; write the page')
    arguments, rest = parser.parse_known_args()
    outcomes = {} if arguments.again or not KEPT.exists() else json.loads(KEPT.read_text())
    sys.path.insert(0, str(ROOT))
    status = 0
    if not arguments.page_only:
        # No deselection of any cell; the page itself is checked by the tests of every run, once it is there.
        cells = ['tests/compatibility', '-m', '', '--deselect', 'tests/compatibility/test_table.py', '-q']
        status = pytest.main(['--rootdir', str(ROOT), *cells, *rest], plugins=[Recorder(outcomes)])

    from tests.compatibility.table import BROKEN, read, write

    text = write(outcomes, versions())
    broken = [cell for cell in read(text) if cell[-1] == BROKEN]
    for cell in broken:
        print('no outcome, or another than expected:', *cell[:-1], sep='  ')
    if broken:
        return 1
    PAGE.write_text(text)
    print(f'wrote {PAGE.relative_to(ROOT)}')
    return int(status)


def versions() -> str:
    packages = ', '.join(f'{name} {version(name)}' for name in PACKAGES)
    return f'Run on {datetime.date.today()} on a CPU, with Python {platform.python_version()}, {packages}.'


if __name__ == '__main__':
    raise SystemExit(main())
