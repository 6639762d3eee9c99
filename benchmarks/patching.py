"""What patching costs beside creating, and importing sem_timm beside importing timm.

    python benchmarks/patching.py

One thread, medians of CPU time, which other processes on the machine disturb least. Goals: patching `resnet50` at most
0.25 of creating it; `import sem_timm` at most 1.10 of `import timm`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise

import timm
import torch

import sem_timm


def import_seconds(package: str) -> float:
    """CPU seconds of a fresh interpreter that imports a package."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', f'import {package}'], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'names', nargs='*', default=['resnet50', 'convnext_tiny', 'vit_small_patch16_224', 'efficientnet_b0']
    )
    parser.add_argument('--runs', type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    imports: dict[str, list[float]] = {'timm': [], 'sem_timm': []}
    for _ in range(args.runs):
        for package, seconds in imports.items():
            seconds.append(import_seconds(package))
    timm_seconds, own_seconds = (statistics.median(seconds) for seconds in imports.values())
    print(
        f'import timm {timm_seconds:.2f} s  import sem_timm {own_seconds:.2f} s  ratio {own_seconds / timm_seconds:.3f}'
    )
    for name in args.names:
        create_and_patch(name)
        runs = [create_and_patch(name) for _ in range(args.runs)]
        created, planned, patched = (statistics.median(run[part] for run in runs) * 1e3 for part in range(3))
        ratio = statistics.median((planned + patched) / created for created, planned, patched in runs)
        print(
            f'{name}: create {created:.0f} ms  plan {planned:.0f} ms  apply {patched:.0f} ms  ratio {ratio:.3f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
