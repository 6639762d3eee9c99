"""What a person sees while a comparison goes on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.progress import TextColumn, TimeRemainingColumn

from sem_timm.comparison.log import FINISHED, RunKey
from sem_timm.finetuning.progress import Bars, OpenDisplay


class ComparisonDisplay(Bars):
    """A bar over all runs, with the time that is left, and one within the run; without a terminal a line for each run.

    Args:
        shown: Whether to show anything: not in other than the first process.
    """

    def __init__(self, shown: bool) -> None:
        # Runs are few and long: the time that is left is told from all of them, not from the last half minute.
        super().__init__(shown, TextColumn('left:'), TimeRemainingColumn(), speed_estimate_period=1e9)
        self._runs = self._bar.add_task('runs', total=1, status='')
        self._done = 0
        self._total = 1
        self._began = time.monotonic()

    def begin(self, total: int) -> None:
        """Tells how many runs are to be done, by this process and those that share the log."""
        self._total = max(total, 1)
        self._bar.update(self._runs, total=total)

    def for_run(self, key: RunKey) -> OpenDisplay:
        """What `run_finetuning` opens as the display of one run."""
        return lambda total, epochs, shown: _RunDisplay(self, key, total)

    def advance_to(self, fraction: float) -> None:
        """Shows how far the current run is, from 0 to 1."""
        self._bar.update(self._runs, completed=self._done + fraction)

    def finish(self, key: RunKey, outcome: dict[str, Any], num_left: int) -> None:
        """Tells what came of a run, and how many are left, of which other processes may have done some."""
        self._done = max(self._done + 1, self._total - num_left)
        self._total = self._done + num_left  # others may have added rows, too
        self._bar.update(self._runs, completed=self._done, total=self._total)
        result = f'accuracy {outcome["accuracy"]:.2%}' if outcome['outcome'] == FINISHED else 'diverged'
        left = (time.monotonic() - self._began) / self._done * num_left
        left_text = f'; about {_duration(left)} left' if num_left else ''
        self.say(f'{self._done}/{self._total}  {label(key)}: {result}{left_text}')

    def add_run(self, description: str, total: int) -> Any:
        """A second bar."""
        return self._bar.add_task(f'  {description}', total=total, status='')

    def update_run(self, task: Any, step: int, status: str) -> None:
        """Moves the second bar."""
        self._bar.update(task, completed=step, status=status)

    def remove_run(self, task: Any) -> None:
        """Takes the second bar away."""
        self._bar.remove_task(task)


class _RunDisplay:
    """The bar within a run, as its `Display`; what a run says of itself is left out."""

    def __init__(self, display: ComparisonDisplay, key: RunKey, total: int) -> None:
        self._display = display
        self._key = key
        self._total = total

    def __enter__(self) -> _RunDisplay:
        self._task = self._display.add_run(label(self._key), self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.remove_run(self._task)

    def update(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Shows where the run is."""
        self._display.update_run(self._task, step, f'epoch {epoch + 1}  loss {values["train/loss"]:.4f}')
        self._display.advance_to(step / max(self._total, 1))

    def say(self, text: str) -> None:
        """Says nothing."""


def label(key: RunKey) -> str:
    """A run, for people to read."""
    return f'{key.row}, seed {key.seed}' + (f', try of learning rate {key.lr:g}' if key.is_try else '')


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
