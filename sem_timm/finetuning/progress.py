"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """A bar with loss, throughput and the time that is left; where there is no terminal, one line each epoch.

    Writes to the standard error, so that results alone go to the standard output.

    Args:
        total: Updates of the run.
        epochs: Epochs of the run.
        shown: Whether to show anything: not in other than the first process.
    """

    def __init__(self, total: int, epochs: int, shown: bool) -> None:
        self.console = Console(file=sys.stderr, quiet=not shown)
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[status]}'),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._epochs = epochs
        self._bar = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        self._task = self._bar.add_task('training', total=total, status='')

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Shows where the run is."""
        status = f'loss {values["train/loss"]:.4f}  {values["train/images_per_second"]:,.0f} images/s'
        self._bar.update(self._task, completed=step, description=f'epoch {epoch + 1}/{self._epochs}', status=status)

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
