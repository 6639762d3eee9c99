"""The page of adapters: its tables are those of the comparisons whose numbers are beside it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / 'docs'
FILES = sorted((DOCS / 'adapters').glob('*.json'))


@pytest.fixture(scope='module')
def adapters() -> ModuleType:
    spec = importlib.util.spec_from_file_location('adapters', DOCS.parent / 'benchmarks' / 'adapters.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_goes_between_its_comments_and_nowhere_else(adapters: ModuleType) -> None:
    page = 'a\n<!-- comparison: x -->\nold\n<!-- end -->\nb\n<!-- comparison: y -->\n<!-- end -->\n'
    once = adapters.filled(page, 'x', adapters.section('# Heading\n\nnew \\1\n'))
    assert once == page.replace('old\n', '\nnew \\1\n\n')
    assert adapters.filled(once, 'x', 'new \\1') == once
    empty = page.replace('old\n', '')
    assert adapters.filled(empty, 'x', 'new \\1') == once
    with pytest.raises(SystemExit, match='no place for z'):
        adapters.filled(page, 'z', 'new')


def table_of(page: str, name: str) -> dict[str, list[str]]:
    part = page.partition(f'<!-- comparison: {name} -->')[2].partition('<!-- end -->')[0]
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in re.findall(r'^\|.*\|$', part, re.M)]
    return {row[0].replace('\\', ''): row for row in rows[2:]}


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_accuracies_of_the_page_are_those_of_the_file(file: Path) -> None:
    results: dict[str, Any] = json.loads(file.read_text())
    table = table_of((DOCS / 'adapters.md').read_text(), file.stem)
    assert [*table] == [row['name'] for row in results['rows']]
    for row in results['rows']:
        runs = row['accuracies'].values()
        assert table[row['name']][1] == str(len(runs))
        if runs:
            assert table[row['name']][2].startswith(f'{100 * fmean(runs):.2f}')


def test_the_page_has_a_table_for_every_comparison_it_names() -> None:
    named = re.findall(r'<!-- comparison: ([\w-]+) -->', (DOCS / 'adapters.md').read_text())
    assert sorted(named) == sorted(file.stem for file in FILES) and named
