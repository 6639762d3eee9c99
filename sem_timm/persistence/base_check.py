"""Whether a patch meets the base weights it was made for."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from sem_timm.errors import BaseWeightsWarning, PatchFileError
from sem_timm.persistence.fingerprint import is_compared
from sem_timm.persistence.record import PatchRecord


def check_base_weights(base: dict[str, Tensor], record: PatchRecord, file: Path, check: str) -> None:
    """Compares the base weights of a model with the fingerprints of a patch, but for those that the patch replaces.

    Args:
        base: The base tensors of the model, by name.
        record: What ``patch.json`` says.
        file: Its path, for messages.
        check: 'warn', 'error' or 'ignore'.

    Raises:
        PatchFileError: If they differ and ``check`` is 'error'.
    """
    if check == 'ignore':
        return
    problems = _problems(base, record)
    if not problems:
        return
    (name, how), total = problems[0], len(record.fingerprints)
    message = (
        f'{file}: fingerprints: the base weights of this model are not those of the patch ({record.base}): '
        f'{len(problems)} of {total} tensors differ; {name} {how}.\n'
        '  Load the patch onto the weights it was saved with, or, if you know that these serve as well, pass '
        "check_base='ignore'."
    )
    if check == 'error':
        raise PatchFileError(message)
    warnings.warn(message, BaseWeightsWarning, stacklevel=3)


def _problems(base: dict[str, Tensor], record: PatchRecord) -> list[tuple[str, str]]:
    replaced = {name for name, tensor in record.tensors.items() if tensor.part == 'base'}
    here = {name: tensor for name, tensor in base.items() if name not in replaced and is_compared(name)}
    problems = []
    for name, known in record.fingerprints.items():
        how = known.compare(here[name]) if name in here else 'is not there'
        if how is not None:
            problems.append((name, how))
    return problems + [(name, 'is not known to the patch') for name in here if name not in record.fingerprints]
