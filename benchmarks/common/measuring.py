"""How the benchmarks measure, judge and keep their figures."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.benchmark import Timer

import sem_timm
from sem_timm.reports.measuring import peak_mib as peak_mib

# As many calls in a row as last this long: caches are then a call's own, and the clock is fine enough.
SERIES_SECONDS = 0.05


@dataclass
class Line:
    """One figure and what it should be at most."""

    name: str
    value: float
    goal: float | None = None
    sides: dict[str, float] = field(default_factory=dict)
    unit: str = ''

    def __str__(self) -> str:
        sides = '  '.join(f'{side} {value:.3f} {self.unit}' for side, value in self.sides.items())
        goal = '' if self.goal is None else f' (goal {self.goal:.2f}{"" if self.value <= self.goal else ", missed"})'
        return f'{self.name:56} {self.value:6.3f}{goal:22} {sides}'.rstrip()


@dataclass
class Times:
    """Seconds of calls that took turns, one list per call, one entry per round."""

    rounds: dict[Any, list[float]]

    def median(self, name: Any) -> float:
        """Median seconds of one call."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: Any, other: Any) -> float:
        """Median over the rounds of the ratio of two calls, so that a slow spell counts on both sides."""
        return statistics.median(a / b for a, b in zip(self.rounds[name], self.rounds[other]))

    def line(self, title: str, name: Any, other: Any, goal: float | None = None) -> Line:
        """The ratio of two calls, with the milliseconds of both."""
        sides = {str(side): self.median(side) * 1e3 for side in (name, other)}
        return Line(title, self.ratio(name, other), goal, sides, 'ms')


def take_turns(
    calls: dict[Any, Callable[[], object]], runs: int, device: str, seconds: float = SERIES_SECONDS
) -> Times:
    """Times calls in series that take turns, in changing order.

    A series lasts for about so many seconds. On a CPU the clock is that of the process, which other work on the machine
    disturbs least; one thread is assumed.
    """
    clock: dict[str, Any] = {'timer': time.process_time} if device == 'cpu' else {}
    timers = {name: Timer('call()', globals={'call': call}, **clock) for name, call in calls.items()}
    for timer in timers.values():
        timer.timeit(2)
    lengths = {n: max(1, round(seconds / max(timer.timeit(1).mean, 1e-6))) for n, timer in timers.items()}
    rounds: dict[Any, list[float]] = {name: [] for name in calls}
    for run in range(runs):
        for name in list(calls) if run % 2 else reversed(list(calls)):
            rounds[name].append(timers[name].timeit(lengths[name]).mean)
    return Times(rounds)


def machine(device: str) -> dict[str, Any]:
    """The processor, the number of threads and the versions that figures belong to."""
    processor = platform.processor() or platform.machine()
    information = Path('/proc/cpuinfo')
    if device == 'cuda':
        processor = torch.cuda.get_device_name()
    elif information.exists():
        names = [line.split(':', 1)[1] for line in information.read_text().splitlines() if line[:10] == 'model name']
        processor = names[0].strip() if names else processor
    return {
        'processor': processor,
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'sem_timm': sem_timm.__version__,
    }


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory, so that no result has to be paged in anew.

    Without it a large tensor is given back to the system or not by chance, which decides the outcome of a whole run:
    paging in costs more than the arithmetic, and squeeze-and-excitation has two such tensors to SEM's one.
    """
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest


def options(description: str | None, runs: int = 11) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=runs, help='rounds per figure')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--out', type=Path, help='file of figures, such as build/figures.json; printed only')
    parser.add_argument('--quick', action='store_true', help='tiny sizes and one round: shows that it works, no more')
    parser.add_argument('--fresh-pages', action='store_true', help="leave the allocator's own habits alone")
    return parser


def prepared(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options and sets threads, seed and allocator."""
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU here.')
    if args.quick:
        args.runs = 1
    if not args.fresh_pages:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return args


def record(path: Path | None, device: str, part: str, lines: list[Line], **figures: Any) -> None:
    """Prints lines, and writes one part of the file of figures, if there is one; other parts stay as they are."""
    print(*lines, sep='\n', flush=True)
    if path is None:
        return
    results = json.loads(path.read_text()) if path.exists() else {}
    figures['lines'] = {line.name: _plain(line) for line in lines}
    figures = {'date': datetime.date.today().isoformat(), 'machine': machine(device), **figures}
    results.setdefault(device, {})[part] = figures
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + '\n')


def _plain(line: Line) -> dict[str, Any]:
    sides = {name: round(value, 4) for name, value in line.sides.items()}
    return {'value': round(line.value, 4), 'goal': line.goal, 'sides': sides, 'unit': line.unit}
