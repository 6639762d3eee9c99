"""What patching costs beside creating, and importing sem_timm beside importing timm.

    python benchmarks/patching.py

One thread, CPU time, which other processes on the machine disturb least; time by the clock is told beside it. The first
patch of a process loads what patching needs and traces every class of blocks for the first time; what is learned of
them is kept, so the second costs less. Users meet the first: each sample is a process of its own, which imports timm,
torch and sem_timm, creates the network and patches it, and does both again. Ratios are medians over processes.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

from common.measuring import Line, options, prepared, record

NETWORKS = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224', 'efficientnet_b0')
FIRST_GOALS = {'resnet50': 0.6}
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


# What a fresh process runs: nothing but what a user's script has is imported before the clock starts.
SAMPLE = """
import json, sys, time
import timm, torch, sem_timm

torch.set_num_threads(1)


def clocks():
    return time.process_time(), time.perf_counter()


def create_and_patch(name):
    start = clocks()
    model = timm.create_model(name)
    created = clocks()
    sem_timm.patch_model(model)
    patched = clocks()
    return [[b - a for a, b in zip(*pair)] for pair in ((start, created), (created, patched))]


print(json.dumps([create_and_patch(sys.argv[1]) for _ in range(2)]))
"""

# Of a sample: [first or second][create or patch][CPU or clock], in seconds.
Sample = list[list[list[float]]]


def sample(name: str) -> Sample:
    """Seconds of creating and patching a network twice in a fresh process."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONDONTWRITEBYTECODE'}
    command = [sys.executable, '-c', SAMPLE, name]
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    seconds: Sample = json.loads(printed.splitlines()[-1])
    return seconds


def patching(name: str, processes: int) -> list[Line]:
    """The ratio for the first network of a process, and for the second."""
    samples = [sample(name) for _ in range(processes + 1)][1:]  # the first compiles and fills the cache of the disk
    lines = []
    for n, title, goal in ((0, 'first', FIRST_GOALS.get(name)), (1, 'second', None)):
        ratio = statistics.median(each[n][1][0] / each[n][0][0] for each in samples)
        sides = {
            f'{what}{clock}': statistics.median(each[n][i][j] for each in samples) * 1e3
            for j, clock in enumerate(('', ' by the clock'))
            for i, what in ((1, 'patch'), (0, 'create'))
        }
        lines.append(Line(f'patch {name} / create it, {title}', ratio, goal, sides, 'ms'))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument('names', nargs='*', default=NETWORKS, help='networks to patch')
    parser.add_argument('--processes', type=int, default=7, help='fresh processes per network')
    args = prepared(parser, arguments)
    names = ('test_resnet',) if args.quick else args.names
    lines = [] if args.quick else [importing(args.runs)]
    for name in names:
        lines += patching(name, 1 if args.quick else args.processes)
    record(args.out, 'cpu', 'patching', lines)


if __name__ == '__main__':
    main()
