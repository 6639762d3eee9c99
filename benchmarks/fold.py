"""Counts, for every architecture of timm, how many gates have a layer to fold into, by its kind.

    python benchmarks/fold.py --json build/zoo_fold.jsonl --out docs/zoo_fold.md

Looks on the meta device only, where nothing is computed: `fold_gates` tries each place in numbers before it uses it.
With --json, a run of this version continues where the last one stopped. About fifteen minutes of one core.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from rich.progress import track

import sem_timm
from common.meta import create_on_meta, own_architectures
from common.run_log import Record, continued, read_log
from sem_timm.surgery import factor_places


@dataclass
class Row:
    """What became of the gates of one architecture."""

    architecture: str
    family: str
    kinds: Counter[str] = field(default_factory=Counter)  # by the kind of the layers
    shifts: Counter[str] = field(default_factory=Counter)  # of these, where a shift has a place, too
    reasons: Counter[str] = field(default_factory=Counter)  # of those without one
    examples: dict[str, str] = field(default_factory=dict)
    error: str = ''
    seconds: float = 0.0

    @classmethod
    def read(cls, record: Record) -> Row:
        """What a log has of an earlier run."""
        return cls(**{**record, **{name: Counter(record[name]) for name in ('kinds', 'shifts', 'reasons')}})

    @property
    def total(self) -> int:
        """How many gates there are."""
        return self.kinds.total() + self.reasons.total()


def look_at(name: str) -> Row:
    """Patches one architecture without weights, and looks for the places of its gates."""
    row = Row(name, timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1])
    start = time.process_time()
    try:
        model = create_on_meta(name).eval()
        sem_timm.patch_model(model, 'sem')
        for place in factor_places(model):
            if place.parameters:
                row.kinds[place.kind] += 1
                row.shifts[place.kind] += bool(place.biases)
                continue
            reason = _general(place.reason)
            row.reasons[reason] += 1
            row.examples.setdefault(reason, f'{name} {place.module}: {place.reason}')
    except Exception as error:  # one failure must not stop the sweep; it is listed
        row.error = f'{type(error).__name__}: {error}'
    row.seconds = time.process_time() - start
    return row


# Reasons without the names of modules and nodes, so that equal ones count together.
_GENERAL = {
    r'.* is read by others as well': 'a value on the way is read by others as well',
    r'.* term of .* has no channels of its own': 'a term of a sum has no channels of its own',
    r'.* has no weights': 'a norm on the way, perhaps of weights, has none of its own',
    r'it comes out of the method .*': 'it comes out of a method of its block',
    r'(.*block is not read|.* is not read): .*': r'\1',
    r'(\w+) in .* does not pass a factor on': r'\1 does not pass a factor on',
    r'[\w.]+ (.*)': r'… \1',
}


def _general(reason: str) -> str:
    for pattern, general in _GENERAL.items():
        if match := re.fullmatch(pattern, reason):
            return re.sub(r'^[\w.]+\.[\w.]+', '…', match.expand(general))
    return reason


def report(rows: list[Row], seconds: float) -> str:
    """The tables of families and of reasons, and what failed."""
    kinds: Counter[str] = sum((row.kinds for row in rows), Counter())
    shifts: Counter[str] = sum((row.shifts for row in rows), Counter())
    reasons: Counter[str] = sum((row.reasons for row in rows), Counter())
    total, placed = kinds.total() + reasons.total(), kinds.total()
    whole = sum(row.total == row.kinds.total() > 0 for row in rows)
    lines = [
        '# Gates with a layer to fold into',
        '',
        f'Made by `benchmarks/fold.py` on {datetime.date.today()} with timm {timm.__version__} and torch '
        f'{torch.__version__}, on the meta device: of {total:,} gates in {len(rows):,} architectures {placed:,} '
        f'({placed / max(total, 1):.1%}) have a layer that takes their mean, and in {whole:,} architectures all have; '
        f'{sum(bool(row.error) for row in rows)} failed. {seconds:.0f} s of one core.',
        '',
        "*With a shift*: where `'ssf'` is put in there, its shift goes into a bias beside its scale. *Norm*: any",
        'other, whose scale alone takes the mean. *Layer scale + bias*: a scale and a bias as parameters of a block.',
        '',
        '| folded into | gates | with a shift |',
        '|---|---:|---:|',
        *(f'| {kind} | {count:,} | {shifts[kind]:,} |' for kind, count in kinds.most_common()),
        f'| none | {reasons.total():,} | |',
        '',
        '## Families',
        '',
        '| family | architectures | gates | with a layer | with a shift | layers |',
        '|---|---:|---:|---:|---:|---|',
    ]
    for family in sorted({row.family for row in rows}):
        members = [row for row in rows if row.family == family]
        own: Counter[str] = sum((row.kinds for row in members), Counter())
        names = ', '.join(f'{kind} {count:,}' for kind, count in own.most_common())
        gates, shifted = sum(row.total for row in members), sum(row.shifts.total() for row in members)
        lines.append(f'| {family} | {len(members)} | {gates:,} | {own.total():,} | {shifted:,} | {names} |')
    lines += ['', '## Without a layer', '', '| reason | gates | architectures | for example |', '|---|---:|---:|---|']
    for reason, count in reasons.most_common():
        having = [row for row in rows if reason in row.reasons]
        example = having[0].examples[reason].replace('|', r'\|')
        lines.append(f'| {reason} | {count:,} | {len(having):,} | {example} |')
    errors = [f'- {row.architecture}: {row.error}' for row in rows if row.error]
    return '\n'.join([*lines, '', '## Failed', '', *(errors or ['None.']), ''])


def sweep(names: list[str], log: Path | None) -> Iterator[Row]:
    """The rows of architectures; those in the log are not looked at again."""
    known = {row.architecture: row for row in map(Row.read, read_log(log) if log else ())}
    return continued(track(names, description='looking'), known, look_at, log)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures; all by default')
    parser.add_argument('--out', type=Path, help='where the Markdown goes; printed otherwise')
    parser.add_argument('--json', type=Path, help='a line per architecture')
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    gc.freeze()
    own = own_architectures()
    rows = list(sweep(args.names or own, args.json))
    gc.unfreeze()
    text = report(rows, sum(row.seconds for row in rows))
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == '__main__':
    main()
