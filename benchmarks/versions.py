"""What the tests gave with which versions of Python, torch and timm: a log, and the page docs/versions.md made of it.

benchmarks/compat.sh calls it in each environment of its matrix, with what pytest wrote:

    python benchmarks/versions.py RESULTS.xml...
"""

from __future__ import annotations

import argparse
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from common.run_log import Record, append_record, read_log

DOCS = Path(__file__).parents[1] / 'docs'
PACKAGES = ('torch', 'torchvision', 'timm', 'numpy')

_HEAD = """# Versions

The tests, run with the oldest versions of Python, torch and timm, with some between, and with the newest.
`benchmarks/compat.sh` runs them, each combination in an environment of its own, and makes this page. The floors and
Python classifiers of `pyproject.toml` are what passed here.

| run on | Python | torch | torchvision | timm | numpy | passed | failed | expected to fail | not run |
|---|---|---|---|---|---|---|---|---|---|
"""

_MIDDLE = """
These are the tests of every run, without those marked `slow`, `thorough` and `clients`. What is *expected to fail* is
known not to work, in most cells because timm's own model cannot do it, and would be an error if it did. *Not run* is
what a version lacks, or cannot do with its own model, by the number of tests:

"""

_FOOT = """
Those conditions are in `tests/versions.py`; of timm, `sem_timm/compat.py` says which names older versions lack.
What an older version has not is refused where it is asked for, such as the stage `'distill'` of `transfer` before
timm 1.0.23. The table of the architectures with self-attention was made with the newest timm; an older one registers
variants of the architectures that it has.
"""


# What holds pyproject.toml against the page cannot pass before there is one, and counts for nothing.
_OWN_TEST = 'tests.benchmarks.test_versions'


def record_of(results: Iterable[Path]) -> Record:
    """What one run gave, in one file or in several parts, with the versions of the Python that this is."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    cases = {
        (case.get('classname'), case.get('name')): case  # of a test that was run again, the last one
        for part in results
        for case in ElementTree.parse(part).getroot().iter('testcase')
    }
    for (where, test), case in cases.items():
        if where == _OWN_TEST:
            continue
        found = next((part for part in case if part.tag in ('failure', 'error', 'skipped')), None)
        if found is None:
            outcomes['passed'] += 1
        elif found.tag != 'skipped':
            outcomes['failed'] += 1
            failures.append(f'{where}.{test}')
        elif found.get('type') == 'pytest.xfail':
            outcomes['xfailed'] += 1
        else:
            outcomes['skipped'] += 1
            reasons[found.get('message', '').removeprefix('Skipped: ')] += 1
    versions = {'python': platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {'date': date.today().isoformat(), **versions, **outcomes, 'reasons': dict(reasons), 'failures': failures}


def page(records: Iterable[Record]) -> str:
    """The newest run of each combination, the oldest combination first, as a page."""
    newest = {(order(r['torch']), order(r['timm']), order(r['python'])): r for r in records}
    ordered = [record for _, record in sorted(newest.items())]
    rows = []
    for record in ordered:
        versions = [str(record[name]) for name in ('date', 'python', *PACKAGES)]
        counts = [f'{record.get(outcome, 0):,}' for outcome in ('passed', 'failed', 'xfailed', 'skipped')]
        rows.append(_row(versions + counts))
    return _HEAD + ''.join(rows) + _MIDDLE + _not_run(ordered) + _failed(ordered) + _FOOT


def _not_run(records: list[Record]) -> str:
    """Why tests did not run, as a table of a column for each combination."""
    counts: dict[str, list[int]] = {}
    for column, record in enumerate(records):
        for reason, count in record['reasons'].items():
            counts.setdefault(_without_version(reason), [0] * len(records))[column] += count
    head = _row(['not run', *map(_name, records)]) + _row(['---', *['--:'] * len(records)])
    often = sorted(counts.items(), key=lambda each: (-max(each[1]), each[0]))
    return head + ''.join(_row([reason, *[str(count or '') for count in found]]) for reason, found in often)


def _failed(records: list[Record]) -> str:
    """Which tests failed, of the runs that noted it."""
    lines = [f'- {_name(record)}: `{test}`' for record in records for test in record.get('failures', ())]
    return '\n'.join(['', 'Failed:', '', *lines, '']) if lines else ''


def _name(record: Record) -> str:
    return f'torch {_public(record["torch"])}, timm {record["timm"]}, Python {_minor(record["python"])}'


def _row(cells: Iterable[str]) -> str:
    return f'| {" | ".join(cells)} |\n'


def _without_version(reason: str) -> str:
    """A reason to leave a test out, alike for all versions, short, and fit for a cell."""
    words = ' '.join(reason.split())
    words = re.sub(r'\. Do: .*', '', words)  # of an error that tells what to type
    words = re.sub(r'\b(timm|torch) \d\S* ', r'\1 ', words)
    return (words if len(words) <= 120 else f'{words[:119]}…').replace('|', '\\|')


def _public(release: str) -> str:
    return release.split('+')[0]


def _minor(release: str) -> str:
    return '.'.join(release.split('.')[:2])


def order(release: str) -> tuple[int, ...]:
    """A release as numbers that compare."""
    return tuple(map(int, re.findall(r'\d+', release.split('+')[0])))


def main(given: Sequence[str] | None = None) -> None:
    """Logs what pytest wrote, and writes the page anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', nargs='+', type=Path, help='what pytest --junit-xml wrote, in one file or in parts')
    log = DOCS / 'versions.jsonl'
    append_record(log, record_of(parser.parse_args(given).results))
    (DOCS / 'versions.md').write_text(page(read_log(log)), encoding='utf-8')


if __name__ == '__main__':
    main()
