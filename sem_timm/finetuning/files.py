"""Files and folders that are there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sem_timm.finetuning.errors import WriteError

# What a run leaves in its folder, beside logs and checkpoints.
OPTIONS, RESULT, WEIGHTS, PATCH = 'options.json', 'result.json', 'model.safetensors', 'patch'

_UNFINISHED, _DOOMED = '.unfinished-', '.removed-'


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name, and gives it its name when all of it is on the disk.

    Args:
        file: The file.
        write: Writes the content to the path that it is given.

    Raises:
        WriteError: If it cannot be written; what was there before is still there.
    """
    unfinished = unfinished_name(file)
    with explained(file):
        try:
            write(unfinished)
            _flush(unfinished)
            os.replace(unfinished, file)
            _flush(file.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def write_text(file: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(file, lambda path: path.write_text(text, encoding='utf-8'))


def unfinished_name(path: Path) -> Path:
    """Where something is written until it is whole."""
    return path.with_name(_UNFINISHED + path.name)


def begin_folder(folder: Path) -> Path:
    """Makes the empty folder in which the content of ``folder`` is written, to be given to `finish_folder`."""
    unfinished = unfinished_name(folder)
    with explained(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(folder: Path) -> None:
    """Gives a folder its name when all that is in it is on the disk."""
    unfinished = unfinished_name(folder)
    with explained(folder):
        for path in unfinished.rglob('*'):
            _flush(path)
        _flush(unfinished)
        os.replace(unfinished, folder)
        _flush(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that at no moment half of it is there under its name."""
    doomed = folder.with_name(_DOOMED + folder.name)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed has left half written or half removed."""
    for path in folder.glob('.*'):
        if path.name.startswith((_UNFINISHED, _DOOMED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
