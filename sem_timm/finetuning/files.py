"""Files and folders that are there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sem_timm.files import UNFINISHED, flush, flush_names, is_abandoned, replace_whole
from sem_timm.finetuning.errors import WriteError

# What a run leaves in its folder, beside logs and checkpoints.
OPTIONS, RESULT, WEIGHTS, PATCH = 'options.json', 'result.json', 'model.safetensors', 'patch'

_DOOMED = '.removed-'


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name, and gives it its name when all of it is on the disk.

    Args:
        file: The file.
        write: Writes the content to the path that it is given.

    Raises:
        WriteError: If it cannot be written; what was there before is still there.
    """
    with explained(file):
        replace_whole(file, write)


def write_text(file: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(file, lambda path: path.write_text(text, encoding='utf-8'))


def unfinished_name(path: Path) -> Path:
    """Where the content of a folder is written until it is whole, by all processes of a run."""
    return path.with_name(UNFINISHED + path.name)


def begin_folder(folder: Path) -> None:
    """Makes the empty folder `unfinished_name` in which the content of ``folder`` is written, for `finish_folder`."""
    unfinished = unfinished_name(folder)
    with explained(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)


def finish_folder(folder: Path) -> None:
    """Gives a folder its name when all that is in it is on the disk."""
    unfinished = unfinished_name(folder)
    with explained(folder):
        for path in unfinished.rglob('*'):
            flush_names(path) if path.is_dir() else flush(path)
        flush_names(unfinished)
        os.replace(unfinished, folder)
    flush_names(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that at no moment half of it is there under its name."""
    doomed = folder.with_name(_DOOMED + folder.name)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed has left half written or half removed."""
    for path in folder.glob('.*'):
        if path.is_dir() and path.name.startswith((UNFINISHED, _DOOMED)):
            shutil.rmtree(path)
        elif is_abandoned(path):
            path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the errors of a failed write, which torch and safetensors raise each in their way, into one that helps."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 2**30
        text = getattr(error, 'strerror', None) or str(error).strip().splitlines()[0]
        raise WriteError(f'cannot write {path}: {text} ({free:.1f} GiB are free there).') from error
