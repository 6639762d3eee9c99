"""Every ratio that this project sets itself a goal for: one result file with its date, as data, as text and as a plot.

    python benchmarks/everything.py                       # or: sem-timm bench; about half an hour of one core
    python benchmarks/everything.py --only gate patching  # parts of it; the others stay as they are in the file
    python benchmarks/everything.py --zoo                 # plans all of timm's architectures, too
    python benchmarks/everything.py --device cuda         # a GPU: bfloat16, batch 256, eager and compiled

Each part is a script of this folder and runs in a process of its own, one after the other; nothing else should run
beside them. Results go to docs/benchmarks/DATE.json, .md and .png, figures of a GPU beside those of a CPU, and the
README quotes them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quoting import README, quoted

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / 'docs' / 'benchmarks'

# What each script measures, and on which devices that has a meaning.
PARTS: dict[str, tuple[str, ...]] = {
    'gate': ('cpu', 'cuda'),
    'models': ('cpu', 'cuda'),
    'patching': ('cpu',),
    'attention': ('cpu', 'cuda'),
    'attention_models': ('cpu', 'cuda'),
    'plan_zoo': ('cpu',),
}
TITLES = {
    'gate': 'One SEM and the residual add',
    'models': 'Whole networks with SEM',
    'patching': 'Importing and patching',
    'layer': 'One attention layer',
    'model': 'A whole vision transformer with External Attention',
    'zoo': "Planning all of timm's architectures on the meta device",
}


def run(part: str, args: argparse.Namespace, out: Path) -> None:
    """Runs one script; in a quick run in this process, which saves most of the time."""
    arguments = ['--out', str(out), '--device', args.device]
    if part == 'plan_zoo':
        arguments = ['--figures', str(out), '--json', str(out.with_suffix('.zoo.jsonl')), '--restart']
    print(f'\n{part}', flush=True)
    if args.quick:
        names = ['test_resnet'] if part == 'plan_zoo' else ['--quick']
        importlib.import_module(part).main([*arguments, *names])
    else:
        subprocess.run([sys.executable, str(FOLDER / f'{part}.py'), *arguments], check=True)


def as_markdown(results: dict[str, Any]) -> str:
    """The result file as tables."""
    text = ['# Benchmarks', '', 'Made by `sem-timm bench`. Every figure is a median; goals are upper bounds.']
    for device, parts in results.items():
        for part, figures in parts.items():
            machine = figures['machine']
            versions = ', '.join(f'{key} {machine[key]}' for key in ('torch', 'timm', 'sem_timm') if key in machine)
            threads = f'{machine["threads"]} thread, ' if device == 'cpu' else ''
            setting = ', '.join(f'{key} {value}' for key, value in figures.get('setting', {}).items())
            text += ['', f'## {TITLES[part]}', '']
            text += [
                f'{figures["date"]}, {machine["processor"]}, {threads}{versions}{"; " + setting if setting else ""}.'
            ]
            text += ['', '| | measured | goal | |', '|---|---:|---:|---|']
            text += [_row(name, line) for name, line in figures['lines'].items()]
    return '\n'.join([*text, ''])


def _row(name: str, line: dict[str, Any]) -> str:
    goal = '' if line['goal'] is None else f'{line["goal"]:.2f}{"" if line["value"] <= line["goal"] else ", missed"}'
    sides = ', '.join(f'{side} {value:,.3f} {line["unit"]}' for side, value in line.get('sides', {}).items())
    return f'| {name} | {line["value"]:.3f} | {goal} | {sides} |'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--only', nargs='+', choices=PARTS, help='parts to measure')
    parser.add_argument('--zoo', action='store_true', help='also plan all architectures, which takes minutes')
    parser.add_argument('--quick', action='store_true', help='tiny sizes and one round: shows that it works, no more')
    parser.add_argument('--out', type=Path, help='folder of the results, docs/benchmarks by default')
    args = parser.parse_args(arguments)
    if args.quick and args.out is None:
        parser.error('--quick measures nothing worth keeping; say where it goes: --out FOLDER.')
    out = (args.out or RESULTS) / f'{datetime.date.today().isoformat()}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = args.only or [part for part in PARTS if part != 'plan_zoo' or args.zoo]
    for part in wanted:
        if args.device in PARTS[part]:
            run(part, args, out)
    results = json.loads(out.read_text())
    out.with_suffix('.md').write_text(as_markdown(results))
    importlib.import_module('goals_plot').draw(results, out.with_suffix('.png'))
    if args.out is None:
        README.write_text(quoted(README.read_text(), results, out.stem))
    print(f'\n{out}, .md and .png')


if __name__ == '__main__':
    main()
