"""What tells the images of one comparison from those of another, on whatever machine they are."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from sem_timm.errors import OptionError
from sem_timm.finetuning import FinetuneOptions
from sem_timm.finetuning.datasets import Data, length_of, open_data
from sem_timm.finetuning.errors import DataError, first_sentence
from sem_timm.finetuning.packaged import PACKAGED
from sem_timm.finetuning.samples import Samples

_LOOKED_AT = 64  # images of a split


def check_splits(options: FinetuneOptions, tuning_fraction: float) -> tuple[int, int]:
    """Numbers of images for training and for validation, if they are enough, for tuning too where there is a search.

    Raises:
        DataError: If they are not.
        SemTimmError: If the data cannot be opened.
    """
    numbers = []
    for fraction in dict.fromkeys((0.0, tuning_fraction)):
        found = open_data(replace(options, tuning_fraction=fraction))
        if found.num_classes < 2:
            raise DataError(f'{options.data} has a single class; there is nothing to tell apart.')
        numbers.append((length_of(found.train), length_of(found.validation)))
    return numbers[0]


def data_identity(options: FinetuneOptions) -> dict[str, Any]:
    """Numbers of images, names of classes, and a digest of some images of both splits and of the file of weights.

    Raises:
        SemTimmError: If the data cannot be opened.
    """
    data = open_data(replace(options, max_train_images=None, tuning_fraction=0.0))
    streams = not isinstance(data.train, Samples)
    return {
        'num_train': None if streams else len(data.train),
        'num_validation': None if streams else len(data.validation),
        'num_classes': data.num_classes,
        'classes': list(data.classes),
        'digest': None if streams else _digest(data),
        'weights': None if options.weights is None else _digest_of_file(options.weights),
    }


def _digest(data: Data) -> str:
    digest = hashlib.sha256()
    for samples in (data.train, data.validation):
        number = len(samples)
        for position in sorted({i * number // _LOOKED_AT for i in range(_LOOKED_AT)}):
            try:
                digest.update(samples.content(position))
            except Exception as error:  # the datasets and PIL each have their own kinds
                digest.update(first_sentence(error).encode())
    return digest.hexdigest()[:16]


def _digest_of_file(name: str) -> str:
    if name in PACKAGED:
        return name
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise OptionError(f'--weights {name} cannot be read: {error.strerror}.') from error


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same in two recipes or two identities of data, for people to read."""
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return [f'{name}={_short(there.get(name))} there and {_short(now.get(name))} here' for name in names]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f'{text[:60]} …'
