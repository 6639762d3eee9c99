"""Runs the tests of programs that take timm models, and writes which of them take patched ones.

    pip install -e '.[dev,clients]'
    git clone https://github.com/huggingface/pytorch-image-models
    TIMM_REPOSITORY=pytorch-image-models python benchmarks/clients.py

The scripts of timm are not in its wheel, so that they need a checkout of it; without one they are left out. Each
program is a file in tests/clients/. What is not installed is kept on the page as it was run last, with the versions of
then, in docs/clients.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'clients.md'
KEPT = ROOT / 'docs' / 'clients.json'

HEAD = """# Programs that take a patched model

Each row is a test in `tests/clients/`: the program is given a plain model, the patched one with gates that are
identities, and the same with gates that do something. What comes of the second is what comes of the first; the third
differs from it, so that the comparison could fail. Where attention was swapped, the program computes what the model
computes by itself. `benchmarks/clients.py` makes this page; `pip install -e '.[clients]'` brings the programs.

"""


class Recorder:
    """A plugin of pytest that keeps what each test is about and what came of it."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped or (report.when != 'call' and report.passed):
            return
        path, _, name = report.nodeid.partition('::')
        module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
        test, _, case = name.partition('[')
        row = self.kept.setdefault(f'{path}::{test}', {'cases': {}})
        row['program'] = module.PROGRAM
        row['versions'] = ', '.join(_versions(module.PROGRAM, 'timm', 'torch'))
        row['what'] = ' '.join((inspect.getdoc(getattr(module, test)) or '').split())
        row['date'] = str(datetime.date.today())
        row['cases'][case] = report.outcome


def _versions(*packages: str) -> Iterator[str]:
    """Packages with their versions, but for what is no package."""
    for package in packages:
        with suppress(PackageNotFoundError):
            yield f'{package} {version(package)}'


def write(kept: dict[str, Any]) -> str:
    """The page in Markdown."""
    lines = ['| program | what is compared | | with |', '|---|---|:-:|---|']
    for row in sorted(kept.values(), key=lambda row: (row['program'].lower(), row['what'])):
        works = all(outcome == 'passed' for outcome in row['cases'].values())
        versions = row['versions'].removeprefix(f'{row["program"]} ')
        lines.append(f'| {row["program"]} | {row["what"]} | {"✓" if works else "✗"} | {versions}, {row["date"]} |')
    return f'{HEAD}' + '\n'.join(lines) + f'\n\nWith Python {platform.python_version()} on a CPU.\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--again', action='store_true', help='forget what former runs gave')
    arguments, rest = parser.parse_known_args()
    kept = {} if arguments.again or not KEPT.exists() else json.loads(KEPT.read_text())
    sys.path.insert(0, str(ROOT))
    # Warnings of these programs are theirs.
    tests = [str(ROOT / 'tests' / 'clients'), '-m', '', '-q', '-W', 'default']
    status = pytest.main(['--rootdir', str(ROOT), *tests, *rest], plugins=[Recorder(kept)])
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + '\n')
    PAGE.write_text(write(kept))
    print(f'wrote {PAGE.relative_to(ROOT)}')
    return int(status)


if __name__ == '__main__':
    raise SystemExit(main())
