"""The command ``sem-timm``: one file per command in `sem_timm.command_line.commands`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from sem_timm.errors import SemTimmError

__all__ = ['main']

_USAGE = 2
_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; what goes wrong on purpose is one line on the standard error.

    Args:
        arguments: What was typed behind ``sem-timm``; by default that of this process.

    Returns:
        The exit code: 0, 2 for errors, 130 and 143 after Ctrl-C and SIGTERM.
    """
    if arguments is None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from sem_timm.command_line.application import create_application
    except ImportError as error:
        return _fail(f"{error.name} is not installed. Do: pip install 'sem_timm[tools]'")
    try:
        code = create_application()(arguments, prog_name='sem-timm', standalone_mode=False)
    except SemTimmError as error:
        stopped = getattr(error, 'exit_code', None)
        if stopped is not None and arguments is None:
            _ignore_signals()
        return _fail(' '.join(str(error).split()), stopped or _USAGE)
    except (KeyboardInterrupt, SystemExit) as error:
        if arguments is None:
            _ignore_signals()
        first = error.__context__
        if isinstance(first, SemTimmError):  # that of an earlier signal, which was on its way here to be told
            return _fail(' '.join(str(first).split()), getattr(first, 'exit_code', _USAGE))
        return getattr(error, 'code', _INTERRUPTED)
    except BrokenPipeError:  # such as of ``sem-timm list | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # What typer says of wrong usage has other classes in other versions.
        told = getattr(error, 'format_message', None)
        if type(error).__name__ == 'Abort':  # its word for KeyboardInterrupt
            return _INTERRUPTED
        if told is None:
            raise
        # It says nothing where no command was typed: then the help was printed.
        return _fail(f'{message} See: sem-timm --help') if (message := told()) else _USAGE
    return code if isinstance(code, int) else 0


def _ignore_signals() -> None:
    """Lets this process end in peace: a signal on its way out would print the traceback of whatever it meets."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Where no training is there to save itself."""
    raise SystemExit(128 + number)


def _fail(message: str, code: int = _USAGE) -> int:
    print(f'sem-timm: {message}', file=sys.stderr)
    return code
