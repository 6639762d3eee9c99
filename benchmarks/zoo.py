"""Patches every architecture of timm with SEM and with external attention, and compares all that must not change.

    python -m benchmarks.zoo                      # all of it, in two processes; goes on where it was stopped
    python -m benchmarks.zoo resnet50 'vit_*'     # some of it, printed

From the folder of the repository. Needs no weights, no network and no GPU. What is compared is in tests/zoo_check.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import sem_timm
from benchmarks.common.meta import own_architectures
from benchmarks.common.run_log import Record, append_record, read_log
from tests.zoo_check import Result, check
from tests.zoo_subject import OPERATIONS, Subject

VERSIONS = {'sem_timm': sem_timm.__version__, 'timm': timm.__version__, 'torch': torch.__version__}
LOG = Path('build/zoo.jsonl')
DOCUMENT = Path('docs/zoo.md')

# What `benchmarks.image_sizes` found, by architecture.
SIZES = Path('docs/zoo_sizes.json')

STATEMENTS = {
    'shape': 'outputs keep their shape and type',
    'identity': 'logits in inference are the same, bit for bit',
    'training': 'outputs in training are the same, bit for bit',
    'old gradients': 'old parameters have the gradients they had, up to the order in which three are added',
    'gradients': 'every new parameter gets a gradient, and every old one that had one and is still read',
    'keys': 'all keys of the state_dict are there, in order, with their values',
    'copy': 'a deep copy computes the same',
    'undo': 'undone, every tensor, class, flag and attribute is the one there was',
}


@dataclass
class Row:
    """What was seen of one architecture."""

    architecture: str
    family: str
    parameters: int = 0
    device: str = ''
    seconds: float = 0.0
    error: str = ''
    results: dict[str, Result] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: VERSIONS)

    @classmethod
    def read(cls, record: Record) -> Row:
        results = {name: Result(**result) for name, result in record['results'].items()}
        return cls(**{**record, 'results': results})

    @property
    def failures(self) -> list[str]:
        """Each as 'operation, statement: what was seen instead'."""
        failed = [f'{op}, {name}: {why}' for op, result in self.results.items() for name, why in result.failed.items()]
        return [self.error, *failed] if self.error else failed


def check_architecture(name: str) -> Row:
    """All operations on one architecture, in a process that computes on one thread."""
    torch.set_num_threads(1)
    row = Row(name, timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1])
    start = time.process_time()
    try:
        subject = Subject(name)
        row.parameters, row.device = subject.parameters, subject.images.device.type
        row.results = {operation: check(subject, operation) for operation in OPERATIONS}
    except Exception as error:  # one failure must not stop the sweep; it is listed
        row.error = f'{type(error).__name__}: {error}'
    row.seconds = time.process_time() - start
    return row


def sweep(names: list[str], log: Path, processes: int) -> Iterator[Row]:
    """The rows of all architectures, first those that an earlier run with the same versions left in the log."""
    logged = [row for row in map(Row.read, read_log(log)) if row.versions == VERSIONS]
    known = {row.architecture: row for row in logged if row.architecture in names}
    yield from known.values()
    rest = [name for name in names if name not in known]
    # New processes for every hundred, since memory that a large model took is not always given back.
    for start in range(0, len(rest), 100):
        with ProcessPoolExecutor(processes, multiprocessing.get_context('spawn')) as pool:
            for future in as_completed([pool.submit(check_architecture, name) for name in rest[start : start + 100]]):
                row = future.result()
                append_record(log, asdict(row))
                yield row


def write_page() -> None:
    """Writes the page anew from the rows that are beside it."""
    rows = [Row.read(record) for record in json.loads(DOCUMENT.with_suffix('.json').read_text())]
    DOCUMENT.write_text(report(rows))


def report(rows: list[Row]) -> str:
    """The whole page: what was compared, the families, what failed, what was refused, and every architecture."""
    sizes = {entry['architecture']: entry for entry in json.loads(SIZES.read_text())} if SIZES.exists() else {}
    lines = [
        '# The zoo',
        '',
        _circumstances(rows),
        '',
        '| | sem | external |',
        '|---|---:|---:|',
        *_summary(rows),
        _of_sizes(list(sizes.values())),
        '',
        _gradient_errors(rows),
        '',
        '## Failures',
        '',
        *([f'- {row.architecture}: {failure}' for row in rows for failure in row.failures] or ['None.']),
        '',
        '## Families',
        '',
        '| family | architectures | with sem | sites | with external | sites |',
        '|---|---:|---:|---:|---:|---:|',
        *_families(rows),
        '',
        '## Refused',
        '',
        'Modules that a plan passes over, and why. Architectures without self-attention are not listed for external.',
        '',
        '| operation | reason | modules | architectures |',
        '|---|---|---:|---:|',
        *_refusals(rows),
        '',
        '## Architectures',
        '',
        *_architectures(rows, sizes),
    ]
    return '\n'.join([*lines, ''])


def _circumstances(rows: list[Row]) -> str:
    hours = sum(row.seconds for row in rows) / 3600
    in_numbers = sum(row.device == 'cpu' for row in rows)
    return (
        f'All {len(rows):,} architectures of timm {timm.__version__}, patched and given back by '
        f'`python -m benchmarks.zoo` with torch {torch.__version__}, in {hours:.1f} '
        'hours of one core. '
        f'{in_numbers:,} of them, up to 100 M parameters, were compared in numbers, with random weights, on the CPU, '
        f'at the smallest images that they take; {len(rows) - in_numbers:,} on the meta device, where numbers count as '
        'equal if their shapes and types are.'
    )


def _summary(rows: list[Row]) -> list[str]:
    def line(title: str, numbers: list[str]) -> str:
        return f'| {title} | {" | ".join(numbers)} |'

    patched = {
        op: [row.results[op] for row in rows if op in row.results and row.results[op].sites] for op in OPERATIONS
    }
    lines = [
        line('architectures patched', [f'{len(patched[op]):,}' for op in OPERATIONS]),
        line('sites', [f'{sum(result.sites for result in patched[op]):,}' for op in OPERATIONS]),
    ]
    for name, meaning in STATEMENTS.items():
        numbers = []
        for op in OPERATIONS:
            held = sum(name in result.held for result in patched[op])
            asked = held + sum(name in result.failed for result in patched[op])
            numbers.append(f'{held:,} of {asked:,}' if asked else '')
        lines.append(line(meaning, numbers))
    return lines


def _gradient_errors(rows: list[Row]) -> str:
    errors = {row.architecture: row.results['sem'].gradient_error for row in rows if 'sem' in row.results}
    largest = max(errors, key=lambda name: errors[name])
    if not errors[largest]:
        return 'The gradients of all old parameters are the same, bit for bit.'
    differing = sum(map(bool, errors.values()))
    return (
        f'The gradients of old parameters are the same bit for bit in {len(errors) - differing:,} architectures. In '
        f'the other {differing} a tensor is read three times, and autograd adds its gradients in another order; the '
        f'largest difference in double precision is {errors[largest]:.1e} of their norm, in {largest}.'
    )


def _families(rows: list[Row]) -> list[str]:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    lines = []
    for family, members in sorted(families.items()):
        numbers = [len(members)]
        for op in OPERATIONS:
            sites = [row.results[op].sites for row in members if op in row.results]
            numbers += [sum(map(bool, sites)), sum(sites)]
        lines.append(f'| {family} | {" | ".join(f"{number:,}" for number in numbers)} |')
    return lines


def _refusals(rows: list[Row]) -> list[str]:
    modules: Counter[tuple[str, str]] = Counter()
    architectures: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        for op, result in row.results.items():
            for refusal in result.refused:
                key = op, ' '.join(refusal.partition(': ')[2].split()).replace('|', r'\|')
                modules[key] += 1
                architectures[key].add(row.architecture)
    found = modules.most_common()
    return [f'| {op} | {why} | {count:,} | {len(architectures[op, why]):,} |' for (op, why), count in found]


def _of_sizes(entries: list[Record]) -> str:
    cells = []
    for op in OPERATIONS:
        taken = sum(entry['taken'].get(op, 0) for entry in entries)
        refused = sum(len(entry['refused'].get(op, ())) for entry in entries)
        cells.append(f'{taken - refused:,} of {taken:,}' if taken else '')
    return f'| other sizes and batches that the base takes, in {len(entries):,} architectures | {" | ".join(cells)} |'


def _architectures(rows: list[Row], sizes: dict[str, Record]) -> list[str]:
    return [
        'Sites in each, with ✗ where a statement failed. Images are square. Other inputs: of six sizes, most of them '
        'not square, and two batches, how many the base takes, and how many of those the patched model takes, by '
        '`python -m benchmarks.image_sizes`.',
        '',
        '| architecture | parameters | images | compared on | sem | other inputs | external | other inputs |',
        '|---|---:|---:|---|---:|---:|---:|---:|',
        *(_architecture(row, sizes.get(row.architecture)) for row in sorted(rows, key=lambda row: row.architecture)),
    ]


def _architecture(row: Row, sizes: Record | None) -> str:
    cells = []
    for op in OPERATIONS:
        result = row.results.get(op, Result(failed={'created': row.error}))
        cells.append((f'{result.sites:,}' if result.sites else '–') + (' ✗' if result.failed else ''))
        taken = sizes['taken'].get(op) if sizes else None
        cells.append('' if taken is None else f'{taken - len(sizes["refused"].get(op, ()))} of {taken}')
    sides = dict.fromkeys(str(result.image_size) for result in row.results.values())
    device = 'numbers' if row.device == 'cpu' else row.device
    return (
        f'| {row.architecture} | {row.parameters / 1e6:,.1f} M | {", ".join(sides)} | {device} | {" | ".join(cells)} |'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('patterns', nargs='*', help='names, with wildcards; all architectures by default')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--log', type=Path, default=LOG, help='a line for each architecture that is done')
    parser.add_argument('--restart', action='store_true', help='forget what an earlier run left in the log')
    args = parser.parse_args()
    if args.restart:
        args.log.unlink(missing_ok=True)
    names = [n for n in own_architectures() if not args.patterns or any(fnmatch.fnmatch(n, p) for p in args.patterns)]
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows = []
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task('no failure', total=len(names))
        for row in sweep(names, args.log, args.processes):
            rows.append(row)
            failed = sum(bool(row.failures) for row in rows)
            progress.update(task, advance=1, description=f'{failed} failed' if failed else 'no failure')
    rows.sort(key=lambda row: row.architecture)
    text = report(rows)
    if args.patterns:
        print(text)
        return
    DOCUMENT.write_text(text)
    lines = ',\n'.join(json.dumps(asdict(row)) for row in rows)
    DOCUMENT.with_suffix('.json').write_text(f'[\n{lines}\n]\n')


if __name__ == '__main__':
    main()
