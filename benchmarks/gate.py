"""SEM with the residual add against timm's squeeze-and-excitation with it: eager, inference, one thread.

Prints the median time of both sides, measured in turn in one process, and their ratio next to the goal.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable

import torch
from timm.layers import SEModule
from torch.utils.benchmark import Timer

from sem_timm.layers import SEM

GOALS = {(8, 256, 56, 56): 0.75, (8, 1024, 14, 14): 0.80}


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, so that no result has to be paged in anew.

    Without it a tensor of this size is given back to the system or not by chance, which decides the outcome of a whole
    run: paging in costs more than the arithmetic, and squeeze-and-excitation has two such tensors to SEM's one.
    """
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest


def medians(calls: dict[str, Callable[[], torch.Tensor]], runs: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, in series of twenty that keep the caches their own."""
    timers = {name: Timer('call()', globals={'call': call}) for name, call in calls.items()}
    rounds = [{name: timer.timeit(20).mean for name, timer in timers.items()} for _ in range(runs // 20)]
    return {name: statistics.median(times[name] for times in rounds) for name in calls}


def compare(shape: tuple[int, int, int, int], memory_format: torch.memory_format, runs: int) -> dict[str, float]:
    """Median seconds of both systems and of the residual add alone."""
    generator = torch.Generator().manual_seed(0)
    branch, shortcut = (
        torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(2)
    )
    sem, squeeze_excitation = SEM(shape[1]).eval(), SEModule(shape[1]).eval()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        'SEM + add': lambda: sem(branch, shortcut),
        'timm SE + add': lambda: squeeze_excitation(branch) + shortcut,
        'add alone': lambda: branch + shortcut,
    }
    with torch.inference_mode():
        return medians(calls, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=400, help='calls per shape and system')
    parser.add_argument('--fresh-pages', action='store_true', help="leave the allocator's own habits alone")
    arguments = parser.parse_args()
    runs = arguments.runs
    if not arguments.fresh_pages:
        keep_freed_memory()
    for name, memory_format in (('contiguous', torch.contiguous_format), ('channels_last', torch.channels_last)):
        for shape, goal in GOALS.items():
            result = compare(shape, memory_format, runs)
            ratio = result['SEM + add'] / result['timm SE + add']
            figures = ', '.join(f'{label} {value * 1e3:.3f} ms' for label, value in result.items())
            aim = f' (goal {goal:.2f})' if name == 'contiguous' else ''
            print(f'{"x".join(map(str, shape)):>14} {name:13} {figures}; ratio {ratio:.3f}{aim}')


if __name__ == '__main__':
    main()
