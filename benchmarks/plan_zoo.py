"""Plans SEM, or another attention, for every architecture of timm, on the meta device, and tabulates what goes where.

    python benchmarks/plan_zoo.py --out docs/zoo_plan.md
    python benchmarks/plan_zoo.py --operation external --out docs/zoo_attention.md --json build/zoo_external.jsonl

Needs no weights and no network; one core is enough. Goals: SEM in all architectures in four minutes, creating them
included; external attention at 11,834 sites or more in 618 architectures, none failed, in twelve. With --json, a run
continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch import nn

import sem_timm
from common.measuring import Line, record
from common.meta import create_on_meta, own_architectures
from common.run_log import Record, continued, read_log
from sem_timm.layers import attention_names


@dataclass
class Row:
    """What planning one architecture gave."""

    architecture: str
    family: str
    operation: str = 'sem'
    applied: bool = False
    sites: int = 0
    residual: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)  # 'name: reason', with '(class)' where attention is swapped
    unlisted: int = 0  # of those refused, how many the message about a model as a whole leaves out
    error: str = ''
    listing: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of processor time, creating included
    creating: float = 0.0

    @classmethod
    def read(cls, record: Record) -> Row:
        """What a log has of an earlier run."""
        counters = {name: Counter(record[name]) for name in ('classes', 'layouts')}
        return cls(**{**record, **counters})


SECONDS = 240.0  # the goal for planning SEM in all architectures


def plan_architecture(name: str, operation: str, apply: bool = False) -> Row:
    """Creates one architecture without weights and plans the operation for it; with ``apply``, also does it."""
    row = Row(name, timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1], operation)
    start = time.process_time()
    try:
        model = create_on_meta(name).eval()
        row.creating = time.process_time() - start
        try:
            plan = sem_timm.plan_model(model, operation)
        except sem_timm.RefusedError as refusal:
            _read_refusal(row, model, str(refusal))
        else:
            _read_plan(row, model, plan)
            if apply:
                _apply_and_undo(model, plan)
                row.applied = True
    except Exception as error:  # one failure must not stop the sweep; it is listed
        row.error = f'{type(error).__name__}: {error}'
    row.seconds = time.process_time() - start
    return row


def _read_plan(row: Row, model: nn.Module, plan: sem_timm.Plan) -> None:
    row.sites = len(plan)
    if plan.swaps_attention:
        row.classes.update(_class_of(model, site.name) for site in plan)
        row.refused = [f'{r.name} ({_class_of(model, r.name)}): {r.reason}' for r in plan.refusals]
        row.listing = [f'{s.name} {s.class_name} {s.attribute} {s.shape} heads={s.num_heads}' for s in plan]
        return
    row.residual = sum(site.position == 'residual' for site in plan)
    row.classes.update(f'{site.class_name} ({site.position})' for site in plan)
    row.layouts.update(site.layout for site in plan)
    row.refused = [f'{refusal.name}: {refusal.reason}' for refusal in plan.refusals]
    row.listing = [
        f'{s.name} {s.class_name} {s.position} {s.layout} {s.channels} prefix={s.num_prefix_tokens} {s.shape}'
        for s in plan
    ]


def _read_refusal(row: Row, model: nn.Module, message: str) -> None:
    """Fills in what the message about a model as a whole tells: how many modules were refused, and the first ones."""
    count = re.search(r'(\d+) (?:attention modules|blocks) were found and refused', message)
    listed = re.findall(r'^  ([\w.]+): (.+)$', message, re.MULTILINE)
    row.refused = [f'{name} ({_class_of(model, name)}): {reason}' for name, reason in listed]
    row.unlisted = max(0, int(count.group(1)) - len(listed)) if count else 0


def _class_of(model: nn.Module, name: str) -> str:
    """Class of a module, with the part of timm that it comes from: many are called Attention."""
    cls = type(model.get_submodule(name))
    return f'{cls.__module__.rsplit(".", 1)[-1]}.{cls.__name__}'


def _apply_and_undo(model: nn.Module, plan: sem_timm.Plan) -> None:
    """Patches a model on the meta device, runs it once and takes the patch out again."""
    before = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())
    images = torch.empty(2, *plan.input_size, device='meta')
    with torch.inference_mode():
        sem_timm.patch_model(model, plan)
        model(images)
    sem_timm.unpatch_model(model)
    after = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())
    if before != after:
        raise AssertionError('undo left modules or keys that were not there before')


def _made_by(operation: str) -> str:
    return (
        f'Made by `benchmarks/plan_zoo.py --operation {operation}` on {datetime.date.today()} with timm '
        f'{timm.__version__} and torch {torch.__version__}'
    )


def insertion_report(rows: list[Row], seconds: float) -> str:
    """The table of families, the architectures with output positions, and what went wrong."""
    lines = [
        '# SEM planned into every architecture of timm',
        '',
        f'{_made_by("sem")}: {sum(bool(r.sites) for r in rows):,} of {len(rows):,} '
        f'architectures, {sum(r.sites for r in rows):,} sites, {sum(r.residual for r in rows):,} of them on residual '
        f'branches, {sum(len(r.refused) for r in rows):,} refused, {sum(bool(r.error) for r in rows)} errors. '
        f'{seconds:.0f} s of one core.',
        '',
        '| family | architectures | sites | on residual branches | layouts | blocks |',
        '|---|---:|---:|---:|---|---|',
    ]
    for family, members in _families(rows):
        classes: Counter[str] = sum((row.classes for row in members), Counter())
        layouts: Counter[str] = sum((row.layouts for row in members), Counter())
        blocks = ', '.join(f'{name} {count:,}' for name, count in classes.most_common())
        sites, residual = sum(row.sites for row in members), sum(row.residual for row in members)
        lines.append(f'| {family} | {len(members)} | {sites:,} | {residual:,} | {", ".join(layouts)} | {blocks} |')
    lines += ['', '## Architectures with output positions', '', '| architecture | at outputs | of sites | blocks |']
    lines.append('|---|---:|---:|---|')
    for row in rows:
        if row.residual < row.sites:
            blocks = ', '.join(f'{name} {count}' for name, count in row.classes.items() if '(output)' in name)
            lines.append(f'| {row.architecture} | {row.sites - row.residual} | {row.sites} | {blocks} |')
    refusals = Counter(reason.split(': ', 1)[-1] for row in rows for reason in row.refused)
    lines += [
        '',
        '## Refused',
        '',
        *([f'- {count:,} ×: {reason}' for reason, count in refusals.most_common()] or ['None.']),
    ]
    errors = [f'- {row.architecture}: {row.error}' for row in rows if row.error]
    return '\n'.join([*lines, '', '## Errors', '', *(errors or ['None.']), ''])


def swap_report(rows: list[Row], seconds: float) -> str:
    """The tables of families and of classes, the reasons of refusals, and what failed."""
    swapped = [row for row in rows if row.sites]
    classes: Counter[str] = sum((row.classes for row in rows), Counter())
    refused = sum(len(row.refused) + row.unlisted for row in rows)
    tried = sum(row.applied for row in rows)
    applied = f'{tried:,} architectures were patched, run once and given back as they were. ' if tried else ''
    lines = [
        f"# Attention '{rows[0].operation}' planned into every architecture of timm",
        '',
        f'{_made_by(rows[0].operation)}: {sum(classes.values()):,} sites in {len(swapped):,} of '
        f'{len(rows):,} architectures and {len(classes)} classes; {refused:,} modules refused; '
        f'{sum(bool(row.error) for row in rows)} failed. {applied}{seconds:.0f} s of one core.',
        '',
        '| family | architectures | with sites | sites | refused | classes |',
        '|---|---:|---:|---:|---:|---|',
    ]
    for family, members in _families(rows):
        of_family: Counter[str] = sum((row.classes for row in members), Counter())
        counts = len(members), sum(bool(row.sites) for row in members), sum(row.sites for row in members)
        turned_down = sum(len(row.refused) + row.unlisted for row in members)
        if counts[2] or turned_down:
            names = ', '.join(f'{name} {count:,}' for name, count in of_family.most_common())
            lines.append(f'| {family} | {" | ".join(f"{n:,}" for n in counts)} | {turned_down:,} | {names} |')
    lines += ['', '## Swapped', '', '| class | architectures | sites |', '|---|---:|---:|']
    for name, count in classes.most_common():
        lines.append(f'| {name} | {sum(name in row.classes for row in rows):,} | {count:,} |')
    lines += ['', '## Refused', '', *_refusal_table(rows)]
    errors = [f'- {row.architecture}: {row.error}' for row in rows if row.error]
    return '\n'.join([*lines, '', '## Failed', '', *(errors or ['None.']), ''])


def _refusal_table(rows: list[Row]) -> list[str]:
    """Reasons by class, the most frequent first."""
    modules: Counter[tuple[str, str]] = Counter()
    architectures: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        for entry in row.refused:
            module, _, reason = entry.partition('): ')
            key = module.partition(' (')[2], ' '.join(reason.split()).replace('|', r'\|')
            modules[key] += 1
            architectures[key].add(row.architecture)
    lines = ['| class | reason | modules | architectures |', '|---|---|---:|---:|']
    lines += [f'| {n} | {why} | {c:,} | {len(architectures[n, why]):,} |' for (n, why), c in modules.most_common()]
    whole = [row for row in rows if row.unlisted]
    if whole:
        more = sum(row.unlisted for row in whole)
        lines += ['', f'Not in this table: {more:,} modules of {len(whole)} architectures in which all attention is']
        lines[-1] += ' refused; of such a model the first five modules are listed.'
    return lines


def _families(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    return sorted(families.items())


def sweep(names: list[str], operation: str, apply: bool, log: Path | None) -> Iterator[Row]:
    """The rows of architectures; those in the log are not planned again."""
    earlier = map(Row.read, read_log(log)) if log else ()
    known = {row.architecture: row for row in earlier if row.operation == operation}
    look_at = partial(plan_architecture, operation=operation, apply=apply)
    return continued(track(names, description='planning'), known, look_at, log)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures; all by default')
    parser.add_argument('--operation', default='sem', choices=('sem', *attention_names()))
    parser.add_argument('--apply', action='store_true', help='also patch each model, run it once on meta, and undo')
    parser.add_argument('--out', type=Path, help='where the Markdown goes; printed otherwise')
    parser.add_argument('--json', type=Path, help='where every site goes, a line per architecture')
    parser.add_argument('--figures', type=Path, help='file of figures, for the time that it took')
    parser.add_argument('--restart', action='store_true', help='forget what an earlier run left in --json')
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore', sem_timm.SwapWarning)
    gc.freeze()  # what was imported stays, and need not be searched for garbage again and again
    if args.json and args.restart:
        args.json.unlink(missing_ok=True)
    own = own_architectures()
    rows = list(sweep(args.names or own, args.operation, args.apply, args.json))
    gc.unfreeze()
    seconds, sides = sum(row.seconds for row in rows), {'create': sum(row.creating for row in rows)}
    sides['plan'] = seconds - sides['create']
    if args.figures:
        goal = SECONDS if args.operation == 'sem' and len(rows) >= len(own) else None
        line = Line(f'plan {args.operation} in {len(rows):,} architectures, seconds', seconds, goal, sides, 's')
        record(args.figures, 'cpu', 'zoo', [line])
    report = insertion_report if args.operation == 'sem' else swap_report
    text = report(rows, seconds)
    if args.out:
        args.out.write_text(text)
    elif not args.figures:
        print(text)


if __name__ == '__main__':
    main()
