"""What README.md says of speed is in the newest result file of the benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_quotes_the_newest_result_file() -> None:
    newest = max((ROOT / 'docs' / 'benchmarks').glob('*.json'))
    section = (ROOT / 'README.md').read_text().partition('\n## Speed\n')[2].partition('\n## ')[0]
    assert set(re.findall(r'docs/benchmarks/[\d-]+\.', section)) == {f'docs/benchmarks/{newest.stem}.'}
    parts = json.loads(newest.read_text())['cpu'].values()
    lines = {name: line for part in parts for name, line in part['lines'].items()}
    rows = re.findall(r'^\| ([^|]*[^|\s-]) \| ([^|]+) \| ?([^|]*) \|$', section, re.MULTILINE)
    assert len(rows) > 5
    for name, value, goal in rows:
        assert name in lines, name
        assert value == f'{lines[name]["value"]:.2f}', name
        wanted = lines[name]['goal']
        missed = ', missed' if wanted is not None and lines[name]['value'] > wanted else ''
        assert goal.strip() == ('' if wanted is None else f'{wanted:.2f}{missed}'), name


def test_result_files_say_where_and_with_what_they_were_measured() -> None:
    for file in (ROOT / 'docs' / 'benchmarks').glob('*.json'):
        assert file.with_suffix('.md').is_file() and file.with_suffix('.png').is_file()
        for parts in json.loads(file.read_text()).values():
            for part in parts.values():
                assert {'processor', 'threads', 'torch', 'timm'} <= part['machine'].keys()
                assert re.fullmatch(r'\d{4}-\d\d-\d\d', part['date'])
