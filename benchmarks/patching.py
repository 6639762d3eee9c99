"""What patching costs beside creating, and importing sem_timm beside importing timm.

    python benchmarks/patching.py

One thread, CPU time, which other processes on the machine disturb least; ratios are medians over rounds. A network is
created and patched several times in one process: what is learned about a kind of block is kept, so the first time
costs more and is told beside the others.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import timm
from measuring import Line, options, prepared, record

import sem_timm

NETWORKS = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224', 'efficientnet_b0')
GOALS = {'resnet50': 0.10}
IMPORT_GOAL = 1.05


def import_seconds(package: str) -> float:
    """CPU seconds of a fresh interpreter that imports a package, compiled as an installed one is."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONDONTWRITEBYTECODE'}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', f'import {package}'], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def importing(runs: int) -> Line:
    """The ratio of the imports, which take turns."""
    rounds: list[dict[str, float]] = []
    for run in range(runs + 1):  # the first compiles
        order = ('timm', 'sem_timm') if run % 2 else ('sem_timm', 'timm')
        rounds.append({package: import_seconds(package) for package in order})
    sides = {package: statistics.median(seconds[package] for seconds in rounds[1:]) for package in ('sem_timm', 'timm')}
    ratio = statistics.median(seconds['sem_timm'] / seconds['timm'] for seconds in rounds[1:])
    return Line('import sem_timm / import timm', ratio, IMPORT_GOAL, sides, 's')


def create_and_patch(name: str) -> tuple[float, float, float]:
    """CPU seconds of creating a model, of planning SEM in it, and of applying the plan."""
    times = [time.process_time()]
    model = timm.create_model(name)
    times.append(time.process_time())
    plan = sem_timm.plan_model(model)
    times.append(time.process_time())
    sem_timm.patch_model(model, plan)
    times.append(time.process_time())
    created, planned, patched = (end - start for start, end in pairwise(times))
    return created, planned, patched


def patching(name: str, runs: int) -> list[Line]:
    """The ratio for the second and later networks of a process, and for its first."""
    first = create_and_patch(name)
    rounds = [create_and_patch(name) for _ in range(runs)]
    plan, apply, create = (statistics.median(r[part] for r in rounds) * 1e3 for part in (1, 2, 0))
    ratio = statistics.median((planned + patched) / created for created, planned, patched in rounds)
    sides = {'plan': plan, 'apply': apply, 'create': create}
    at_first = {part: first[n] * 1e3 for n, part in ((1, 'plan'), (2, 'apply'))}
    return [
        Line(f'patch {name} / create it', ratio, GOALS.get(name), sides, 'ms'),
        Line(
            f'patch {name} / create it, first',
            sum(at_first.values()) / create,
            None,
            {**at_first, 'create': create},
            'ms',
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument('names', nargs='*', default=NETWORKS, help='networks to patch')
    args = prepared(parser, arguments)
    names = ('test_resnet',) if args.quick else args.names
    lines = [] if args.quick else [importing(args.runs)]
    for name in names:
        lines += patching(name, args.runs)
    record(args.out, 'cpu', 'patching', lines)


if __name__ == '__main__':
    main()
