"""The two files of a patch on disk: written so that a full disk or a kill leaves the patch that was there before.

The tensors go to a file named by a hash of its contents, then ``patch.json``, which names that file, is replaced in one
step, and only then the file of the patch before is removed.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor

from sem_timm.errors import PatchFileError
from sem_timm.files import is_abandoned, replace_whole
from sem_timm.persistence.fingerprint import dtype_name
from sem_timm.persistence.record import RECORD_NAME, WEIGHTS_PATTERN, PatchRecord, TensorRecord, WeightsFile

_UNFINISHED = '.patch-'


def encode(tensors: dict[str, Tensor]) -> tuple[WeightsFile, bytes]:
    """The file of some tensors, to be written later."""
    # Copies of their own: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(copies, {'format': 'pt'})
    digest = _digest(data)
    return WeightsFile(f'patch-{digest}.safetensors', len(data), digest), data


def check_folder(folder: Path) -> None:
    """Raises PatchFileError if a file is in the way of a folder."""
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        named = f' Name the folder: {folder.parent}.' if folder.name == RECORD_NAME and blocking == folder else ''
        raise PatchFileError(f'{blocking} is a file, and a patch is saved into a folder, which is made for it.{named}')


def write(folder: Path, record: PatchRecord, data: bytes) -> None:
    """Writes a patch, in place of the one that may be there.

    Raises:
        OSError: If that fails; the folder then holds the patch it held before.
    """
    text = record.to_json().encode('utf-8')
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / record.weights.file
    is_new = not new.exists()
    try:
        replace_whole(new, lambda path: path.write_bytes(data), _UNFINISHED)
        replace_whole(folder / RECORD_NAME, lambda path: path.write_bytes(text), _UNFINISHED)
    except BaseException:
        # An interrupt may come when all is done; and the patch before may have the same tensors.
        with suppress(OSError):
            if is_new and not ((folder / RECORD_NAME).is_file() and (folder / RECORD_NAME).read_bytes() == text):
                new.unlink()
        raise
    with suppress(OSError):  # the patch is saved
        _remove_leftovers(folder, new.name)


def _remove_leftovers(folder: Path, kept: str) -> None:
    """Removes the tensors of earlier patches, and what killed processes left unfinished."""
    for entry in folder.iterdir():
        with suppress(OSError):
            old = re.fullmatch(WEIGHTS_PATTERN, entry.name) is not None and entry.name != kept
            if old or is_abandoned(entry, _UNFINISHED):
                entry.unlink()


def read_tensors(folder: Path, record: PatchRecord) -> dict[str, Tensor]:
    """Reads the tensors of a patch and checks that they are those that its record tells.

    Raises:
        PatchFileError: If the file is missing, cut off or changed, or holds other tensors.
    """
    file, expected = folder / record.weights.file, record.weights
    try:
        with file.open('rb') as stream:
            data = stream.read(expected.size + 1)
    except OSError as error:
        raise PatchFileError(
            f'{file}, which {RECORD_NAME} names, cannot be read: {error.strerror or error}.'
        ) from error
    if data.startswith(b'version https://git-lfs'):
        raise PatchFileError(f'{file} is a pointer of Git LFS and not the file itself; git lfs pull fetches it.')
    if len(data) != expected.size:
        more = 'more than' if len(data) > expected.size else f'{len(data):,} of'
        raise PatchFileError(
            f'{file} was cut off or changed: it has {more} the {expected.size:,} bytes it should have.'
        )
    if _digest(data) != expected.digest:
        raise PatchFileError(
            f'{file} was changed or damaged: its contents do not match weights.digest of {RECORD_NAME}.'
        )
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # whatever a hostile header provokes
        raise PatchFileError(f'{file} is no valid safetensors file: {type(error).__name__}: {error}') from error
    _check(file, tensors, record.tensors)
    return tensors


def _check(file: Path, tensors: dict[str, Tensor], records: dict[str, TensorRecord]) -> None:
    for name in sorted(records.keys() - tensors.keys()):
        raise PatchFileError(f'{file} lacks the tensor {name!r}, which {RECORD_NAME} lists under tensors.')
    for name in sorted(tensors.keys() - records.keys()):
        raise PatchFileError(f'{file} has the tensor {name!r}, which {RECORD_NAME} does not list under tensors.')
    for name, tensor in tensors.items():
        found, said = (dtype_name(tensor.dtype), tuple(tensor.shape)), (records[name].dtype, records[name].shape)
        if found != said:
            raise PatchFileError(
                f'{file}: {name!r} is {found[0]} {found[1]}, and tensors.{name} says {said[0]} {said[1]}.'
            )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
