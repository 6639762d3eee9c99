"""Files that are there as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

UNFINISHED = '.unfinished-'
_ABANDONED = 3600.0  # seconds after which an unfinished file belongs to no process any more


def replace_whole(file: Path, write: Callable[[Path], object], prefix: str = UNFINISHED) -> None:
    """Writes a file under a name of its own, down to the disk, and then gives it its name.

    Args:
        file: The file.
        write: Writes the content to the path that it is given.
        prefix: What that name begins with; the rest is random, so that processes do not meet.

    Raises:
        Exception: What ``write`` or the system raises; what was there before is still there then.
    """
    unfinished = file.with_name(f'{prefix}{secrets.token_hex(8)}')
    try:
        write(unfinished)
        flush(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    flush_names(file.parent)


def flush(file: Path) -> None:
    """Writes the content of a file down to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_names(folder: Path) -> None:
    """Writes the names in a folder down to the disk, where the system can do that."""
    with suppress(OSError):
        flush(folder)


def is_abandoned(file: Path, prefix: str = UNFINISHED) -> bool:
    """Whether a file is what a killed process left unfinished."""
    return file.name.startswith(prefix) and time.time() - file.stat().st_mtime > _ABANDONED
