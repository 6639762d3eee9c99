"""Ctrl-C and SIGTERM as a wish that is granted at the next good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from sem_timm.finetuning.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within ``with``, remembers the first signal instead of letting it end the process; a second one stops at once.

    The second one leaves the block with the `StoppedError` of the first, and further ones do nothing. Outside of the
    main thread, where Python handles no signals, it remembers nothing.

    Args:
        patient: Whether further signals are ignored. A launcher of several processes passes on the signal that these
            processes got from the terminal themselves.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.patient = True
        # Held back meanwhile: Python reports a signal whose handler goes while it is on its way.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if kind is KeyboardInterrupt and self.signal_number is not None:
            at_once = 'at once, at a second signal; what was saved before is whole'
            raise StoppedError(self.signal_number, at_once) from None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
        elif not self.patient:
            self.patient = True
            # Unlike an error of our own, nobody on the way takes this for a failure of what is being done.
            raise KeyboardInterrupt
