"""Comparisons of seconds on a few images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from sem_timm.comparison import ComparisonResult, compare
from sem_timm.finetuning.stopping import StopRequest
from tests.lively import lively


def write_weights(folder: Path) -> Path:
    """Weights of a base in which gates act: in timm's initial ones the branches are zero."""
    file = folder / 'weights.pth'
    torch.save(lively(timm.create_model('test_resnet', num_classes=3)).state_dict(), file)
    return file


def options(data: Path | str, folder: Path, **given: Any) -> dict[str, Any]:
    """Options of a small comparison: six updates in each of two epochs, two seeds."""
    small = {
        'model': 'test_resnet',
        'image_size': 16,
        'data': str(data),
        'epochs': 2,
        'batch_size': 8,
        'cpu': True,
        'seeds': 2,
        'costs': False,
        'progress': False,
        'pretrained': False,
        'output': str(folder),
    }
    return {**small, **given}


def compare_small(data: Path | str, folder: Path, **given: Any) -> ComparisonResult:
    """A small comparison to its end."""
    return compare(**options(data, folder, **given))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of a log of one kind."""
    entries = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [entry for entry in entries if entry['kind'] == kind]


@contextmanager
def stopped_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, Ctrl-C comes after so many updates have asked for it."""
    asked = count(1)
    with monkeypatch.context() as patch:
        told = property(lambda stop: 2 if next(asked) > number else None, lambda *given: None)
        patch.setattr(StopRequest, 'signal_number', told, raising=False)
        yield
