"""Runs of a second on a few images, and what they wrote."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sem_timm.finetuning import FinetuneResult, StoppedError, finetune

CLASSES = ('circle', 'cross', 'square')
NUM_TRAIN, NUM_VALIDATION = 16, 5  # of each class


def write_images(folder: Path, *, splits: bool = True) -> Path:
    """A folder of small images of three classes, which differ in colour, with or without a folder for each split."""
    numbers = np.random.RandomState(0)
    parts = {'train': NUM_TRAIN, 'validation': NUM_VALIDATION} if splits else {'': NUM_TRAIN}
    for split, count in parts.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = numbers.randint(0, 120, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


def options(data: Path | str, run: Path, **given: Any) -> dict[str, Any]:
    """Options of a small run: six updates in each of two epochs."""
    small = {
        'model': 'test_resnet',
        'pretrained': False,
        'image_size': 16,
        'data': str(data),
        'output': str(run),
        'epochs': 2,
        'batch_size': 8,
        'trackers': (),
        'progress': False,
        'cpu': True,
    }
    return {**small, **given}


def run_small(data: Path | str, run: Path, **given: Any) -> FinetuneResult:
    """A small run to its end."""
    return finetune(**options(data, run, **given))


def stop_small(data: Path | str, run: Path, step: int, **given: Any) -> None:
    """A small run that is stopped after a step."""
    try:
        finetune(**options(data, run, stop_at=step, **given))
    except StoppedError:
        return
    raise AssertionError('the run was not stopped')


def column(run: Path, name: str, kind: str = 'train') -> list[str]:
    """One column of a CSV file of a run, as written."""
    with (run / f'{kind}.csv').open(newline='') as stream:
        return [row[name] for row in csv.DictReader(stream)]
