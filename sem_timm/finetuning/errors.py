"""What can go wrong while a model is trained."""

from __future__ import annotations

import signal

from sem_timm.errors import SemTimmError


class DataError(SemTimmError):
    """Images or labels cannot be used: the message names the file, folder or class."""


class CheckpointError(SemTimmError):
    """A run or a checkpoint of it cannot be continued from."""


class WriteError(SemTimmError):
    """A file could not be written; what was there before is still there."""


class DivergedError(SemTimmError):
    """The loss or a gradient is no longer a finite number.

    Args:
        what: What is not finite, at which step.
        more: Where, and what may be done about it.

    Attributes:
        what: What is not finite, at which step.
    """

    def __init__(self, what: str, more: str) -> None:
        super().__init__(f'{what}. {more}')
        self.what = what


class StoppedError(SemTimmError):
    """Training was asked to stop, saved its state, and stopped.

    Args:
        signal_number: The signal that asked for it.
        where: Where it stopped, and how it goes on.

    Attributes:
        exit_code: What a process returns that ends by this signal.
    """

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f'{signal.Signals(signal_number).name} stopped the training {where}')
        self.exit_code = 128 + signal_number


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of another library, without its full stop; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        return ' '.join([type(error).__name__, *lines[:1]])
    # Further sentences give advice, in terms that are not those of our options.
    return ' '.join(lines[: 2 if lines[0].endswith(':') else 1]).split('. ')[0].rstrip('.')
