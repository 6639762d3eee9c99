"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Own = TypeVar('Own', bound='Bars')


class Display(Protocol):
    """What a run is shown by, in a ``with`` statement."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Shows where the run is: updates done, epochs done, and what the log of training has of the last update."""

    def say(self, text: str) -> None:
        """Shows a line."""


# From the number of updates, of epochs, and whether to show anything.
OpenDisplay: TypeAlias = Callable[[int, int, bool], Display]


class Bars:
    """Bars on the standard error, so that results alone go to the standard output; shown where there is a terminal.

    Args:
        shown: Whether to show anything: not in other than the first process.
        columns: What stands at the end of each, behind the time that has gone.
        **options: Further options of `rich.progress.Progress`.
    """

    def __init__(self, shown: bool, *columns: ProgressColumn, **options: Any) -> None:
        self.console = Console(file=sys.stderr, quiet=not shown)
        first = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[status]}')
        is_silent = not (shown and self.console.is_terminal)
        self._bar = Progress(*first, TimeElapsedColumn(), *columns, console=self.console, disable=is_silent, **options)

    def __enter__(self: Own) -> Own:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the bars where there are some."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class ProgressDisplay(Bars):
    """A bar with loss, throughput and the time that is left; where there is no terminal, one line each epoch.

    Args:
        total: Updates of the run.
        epochs: Epochs of the run.
        shown: Whether to show anything: not in other than the first process.
    """

    def __init__(self, total: int, epochs: int, shown: bool) -> None:
        super().__init__(shown, TimeRemainingColumn())
        self._epochs = epochs
        self._task = self._bar.add_task('training', total=total, status='')

    def update(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Shows where the run is."""
        status = f'loss {values["train/loss"]:.4f}  {values["train/images_per_second"]:,.0f} images/s'
        self._bar.update(self._task, completed=step, description=f'epoch {epoch + 1}/{self._epochs}', status=status)
