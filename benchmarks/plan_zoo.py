"""Plans SEM for every architecture of timm, on the meta device, and tabulates what is planned where.

    python benchmarks/plan_zoo.py --out docs/zoo_plan.md

Needs no weights and no network; one core is enough. Goal: all architectures in ten minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from rich.progress import track

import sem_timm


@dataclass
class Row:
    """What planning one architecture gave."""

    architecture: str
    family: str
    sites: int = 0
    residual: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    error: str = ''
    listing: list[str] = field(default_factory=list)


def plan_architecture(name: str) -> Row:
    """Creates one architecture without weights and plans SEM for it."""
    row = Row(name, timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1])
    try:
        with torch.device('meta'):
            model = timm.create_model(name)
        plan = sem_timm.plan_model(model)
    except Exception as error:  # one failure must not stop the sweep; it is listed
        row.error = f'{type(error).__name__}: {error}'
        return row
    row.sites = len(plan)
    row.residual = sum(site.position == 'residual' for site in plan)
    row.classes.update(f'{site.class_name} ({site.position})' for site in plan)
    row.layouts.update(site.layout for site in plan)
    row.refused = [f'{refusal.name}: {refusal.reason}' for refusal in plan.refusals]
    row.listing = [
        f'{s.name} {s.class_name} {s.position} {s.layout} {s.channels} prefix={s.num_prefix_tokens} {s.shape}'
        for s in plan
    ]
    return row


def markdown(rows: list[Row], seconds: float) -> str:
    """The table of families, the architectures with output positions, and what went wrong."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    lines = [
        '# SEM planned into every architecture of timm',
        '',
        f'timm {timm.__version__}, torch {torch.__version__}: {sum(bool(r.sites) for r in rows):,} of {len(rows):,} '
        f'architectures, {sum(r.sites for r in rows):,} sites, {sum(r.residual for r in rows):,} of them on residual '
        f'branches, {sum(len(r.refused) for r in rows):,} refused, {sum(bool(r.error) for r in rows)} errors. '
        f'{seconds:.0f} s of one core.',
        '',
        '| family | architectures | sites | on residual branches | layouts | blocks |',
        '|---|---:|---:|---:|---|---|',
    ]
    for family, members in sorted(families.items()):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures; all by default')
    parser.add_argument('--out', type=Path, help='where the Markdown goes; printed otherwise')
    parser.add_argument('--json', type=Path, help='where every site goes, a line per architecture')
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.names or [name for name in timm.list_models() if not name.endswith('_sem')]
    start = time.process_time()
    rows = [plan_architecture(name) for name in track(names, description='planning')]
    text = markdown(rows, time.process_time() - start)
    if args.json:
        args.json.write_text('\n'.join(json.dumps(vars(row)) for row in rows) + '\n')
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == '__main__':
    main()
