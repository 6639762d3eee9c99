"""Makes sem_timm/registry/attention_sites.json: in which architectures of timm self-attention can be replaced.

    python benchmarks/attention_table.py                     # all architectures; continues where it was stopped
    python benchmarks/attention_table.py vit_base_patch16_224 levit_128  # plans these and compares with the table

Plans on the meta device, without weights and without a network; about twenty minutes of one core. The table is written
when every architecture was planned and none failed. Every plan is a line of the log, from which a run continues; after
a change of the code, start with --restart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn

import sem_timm
from common.meta import create_on_meta, own_architectures
from common.run_log import append_record, read_log
from sem_timm.registry.table import COLUMNS, AttentionTable, read_table, write_table
from sem_timm.registry.variant_operation import VariantOperation

ROOT = Path(__file__).parents[1]


@dataclass
class Row:
    """What planning one attention in one architecture gave."""

    timm: str
    architecture: str
    operation: str
    sites: int = 0
    classes: list[str] = field(default_factory=list)
    refused: list[tuple[str, str, int]] = field(default_factory=list)  # class, reason, how often
    error: str = ''
    seconds: float = 0.0


def plan(model: nn.Module, architecture: str, operation: str) -> Row:
    """Plans one attention in a model on the meta device."""
    row = Row(timm.__version__, architecture, operation)
    start = time.process_time()
    try:
        found = sem_timm.plan_model(model, operation)
        row.sites = 0 if _loses_skill(found) else len(found)
        row.classes = sorted({site.class_name for site in found})
        refusals = Counter((refusal.class_name, refusal.reason) for refusal in found.refusals)
        row.refused = [(*refusal, count) for refusal, count in refusals.items()]
    except sem_timm.RefusedError as error:  # of the model as a whole: it has no such site
        row.refused = [(type(model).__name__, str(error), 1)]
    except Exception as error:  # one failure must not stop the sweep; it is listed
        row.error = f'{type(error).__name__}: {error}'
    row.seconds = round(time.process_time() - start, 2)
    return row


def _loses_skill(plan: sem_timm.Plan) -> bool:
    """Whether a plan would be close to the original, but for what goes with the old attention."""
    return plan.needs_training and bool(plan.operation.fidelity)


def rows(names: Iterable[str], operations: list[str], known: dict[tuple[str, str], Row]) -> Iterator[Row]:
    """The rows of architectures, those that are known already first."""
    for name in names:
        wanted = [operation for operation in operations if (name, operation) not in known]
        yield from (known[name, operation] for operation in operations if operation not in wanted)
        if wanted:
            model = create_on_meta(name)
            yield from (plan(model, name, operation) for operation in wanted)


def known_rows(log: Path) -> dict[tuple[str, str], Row]:
    """The plans of earlier runs with this version of timm."""
    logged = [Row(**record) for record in read_log(log)]
    return {(row.architecture, row.operation): row for row in logged if row.timm == timm.__version__}


def progress(found: Iterable[Row], total: int) -> Iterator[Row]:
    """Shows how far a sweep is."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        start = time.monotonic()
        for number, row in enumerate(found, 1):
            yield row
            if number % 50 == 0 or number == total:
                print(f'{number} of {total} plans, {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)
    else:
        yield from track(found, total=total, description='planning', console=Console(stderr=True))


def report(found: list[Row]) -> None:
    """Prints what was planned, by operation."""
    for operation in dict.fromkeys(row.operation for row in found):
        of_operation = [row for row in found if row.operation == operation]
        with_sites = [row for row in of_operation if row.sites]
        classes = {name for row in with_sites for name in row.classes}
        print(
            f'{operation}: {sum(row.sites for row in with_sites):,} sites in {len(with_sites):,} of '
            f'{len(of_operation):,} architectures, {len(classes)} names of classes, '
            f'{sum(bool(row.error) for row in of_operation)} failed, '
            f'{sum(row.seconds for row in of_operation):.0f} s'
        )
        reasons: Counter[tuple[str, str]] = Counter()
        for row in with_sites:
            reasons.update({(name, reason): count for name, reason, count in row.refused})
        for (name, reason), count in reasons.most_common():
            print(f'  refused {count:,} × {name}: {reason}')
        for row in of_operation:
            if row.error:
                print(f'  failed {row.architecture}: {row.error}')


def compare(found: list[Row]) -> bool:
    """Prints where plans differ from the table that is shipped."""
    table = read_table()
    differing = [
        row for row in found if table.count(row.architecture, VariantOperation(row.operation)) != row.sites or row.error
    ]
    for row in differing:
        count = table.count(row.architecture, VariantOperation(row.operation))
        print(f'{row.architecture} {row.operation}: the table has {count}, the plan {row.sites} {row.error}')
    print(f'{len(found) - len(differing)} of {len(found)} plans are as in the table')
    return not differing


def write(found: list[Row], names: list[str]) -> bool:
    """Writes the table that is shipped, if there is all that it needs."""
    counts = {(row.architecture, row.operation): row.sites for row in found if not row.error}
    lacking = [(name, operation) for name in names for operation in COLUMNS if (name, operation) not in counts]
    if lacking:
        print(f'the table was not written: {len(lacking)} plans are lacking, such as {lacking[0]}')
        return False
    write_table(
        AttentionTable(timm.__version__, {name: [counts[name, operation] for operation in COLUMNS] for name in names})
    )
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures to compare with the table; by default all are planned')
    parser.add_argument('--operations', nargs='+', default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument('--log', type=Path, default=ROOT / 'build' / 'attention_table.jsonl')
    parser.add_argument('--restart', action='store_true', help='forget the plans of earlier runs')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.names:
        found = list(progress(rows(args.names, args.operations, {}), len(args.names) * len(args.operations)))
        report(found)
        return 0 if compare(found) else 1
    if args.restart:
        args.log.unlink(missing_ok=True)
    names = own_architectures()
    known = known_rows(args.log)
    found = []
    for row in progress(rows(names, args.operations, known), len(names) * len(args.operations)):
        found.append(row)
        if (row.architecture, row.operation) not in known:
            append_record(args.log, asdict(row))
    report(found)
    return 0 if write([*known.values(), *found], names) else 1


if __name__ == '__main__':
    sys.exit(main())
