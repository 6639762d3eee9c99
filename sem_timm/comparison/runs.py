"""The runs of a comparison: which there are to do, and one of them done."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sem_timm.comparison.log import DIVERGED, FINISHED, Record, RunKey
from sem_timm.comparison.rows import Row
from sem_timm.finetuning import CheckpointError, DivergedError, FinetuneOptions, FinetuneResult
from sem_timm.finetuning.calls import run_finetuning
from sem_timm.finetuning.checkpoints import Checkpoints
from sem_timm.finetuning.files import OPTIONS, write_text
from sem_timm.finetuning.progress import OpenDisplay

RUNS = 'runs'


@dataclass(frozen=True)
class Search:
    """How the learning rate of each row is found.

    Attributes:
        lrs: Those that are tried.
        seeds: Seeds of each try.
        fraction: Share of the training images on which tries are measured.
    """

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    fraction: float


def pending_runs(record: Record, search: Search | None, lr: float, seeds: Sequence[int]) -> list[RunKey]:
    """The runs that are still to be done, in order: all rows of one seed, then of the next.

    Where there is a search, first all tries of all rows; the runs of a row follow when its tries are done.

    Args:
        record: What the log says.
        search: The search, or None.
        lr: The learning rate of all without a search.
        seeds: The seeds of this process.
    """
    rows = [name for name in record.rows if name not in record.refused]
    keys: list[RunKey] = []
    if search is not None:
        keys = [RunKey(name, seed, rate, True) for seed in search.seeds for name in rows for rate in search.lrs]
    chosen = {name: chosen_lr(record, search, lr, name) for name in rows}
    keys += [RunKey(name, seed, rate) for seed in seeds for name, rate in chosen.items() if rate is not None]
    return [key for key in keys if key not in record.runs]


def chosen_lr(record: Record, search: Search | None, lr: float, row: str) -> float | None:
    """The learning rate of a row: that of its tries with the highest mean accuracy, of equals the lower loss.

    A try that diverged with any seed does not count, unless all did. None while tries are missing.
    """
    if search is None:
        return lr
    tries = {rate: [record.runs.get(RunKey(row, seed, rate, True)) for seed in search.seeds] for rate in search.lrs}
    if any(entry is None for entries in tries.values() for entry in entries):
        return None
    return max(search.lrs, key=lambda rate: _merit(tries[rate]))


def _merit(tries: Sequence[dict[str, Any] | None]) -> tuple[float, float]:
    finished = [entry for entry in tries if entry is not None and entry['outcome'] == FINISHED]
    if len(finished) < len(tries):
        return -math.inf, -math.inf
    return sum(entry['accuracy'] for entry in finished), -sum(entry['loss'] for entry in finished)


def left_runs(record: Record, search: Search | None, lr: float, seeds: Sequence[int]) -> int:
    """How many runs are still to be done, those of rows whose tries are missing included."""
    rows = [name for name in record.rows if name not in record.refused]
    waiting = sum(chosen_lr(record, search, lr, name) is None for name in rows)
    return len(pending_runs(record, search, lr, seeds)) + waiting * len(seeds)


def folder_of(folder: Path, key: RunKey) -> Path:
    """The folder of a run in that of a comparison; of unlike runs they are unlike."""
    label = re.sub(r'[^\w.+-]+', '-', key.row).strip('-')[:40]
    digest = hashlib.sha256(key.row.encode()).hexdigest()[:6]
    kind = '-try' if key.is_try else ''
    return folder / RUNS / f'{label}-{digest}-seed{key.seed}-lr{key.lr:g}{kind}'


def lock_of(folder: Path, key: RunKey) -> Path:
    """The file by which a process claims a run."""
    run = folder_of(folder, key)
    return run.with_name(f'{run.name}.lock')


def run_options(base: FinetuneOptions, row: Row, key: RunKey, search: Search | None, run: Path) -> FinetuneOptions:
    """All options of one run."""
    fraction = search.fraction if search is not None and key.is_try else 0.0
    return replace(
        row.applied_to(base),
        seed=key.seed,
        lr=key.lr,
        min_lr=min(base.min_lr, key.lr),
        tuning_fraction=fraction,
        output=str(run),
        trackers=(),
        keep=1,
    )


def do_run(options: FinetuneOptions, open_display: OpenDisplay) -> dict[str, Any]:
    """Does one run, or goes on with it where it was stopped; returns what the log is told.

    Raises:
        SemTimmError: As `finetune`, but for DivergedError, which is an outcome.
    """
    run = Path(options.output or '')
    try:
        result = _begin_or_go_on(options, run, open_display)
    except DivergedError as error:
        return {'outcome': DIVERGED, 'reason': error.what}
    last = result.history[-1]
    if not math.isfinite(last['loss']):
        return {'outcome': DIVERGED, 'reason': f'the loss on the measured images is {last["loss"]}'}
    return {
        'outcome': FINISHED,
        'accuracy': last['accuracy'],
        'loss': last['loss'],
        'before': result.before,
        'images': list(result.num_images),
        'steps': result.num_steps,
        'bad_images': len(result.bad_images),
        'seconds': round(result.seconds, 2),
    }


def _begin_or_go_on(options: FinetuneOptions, run: Path, open_display: OpenDisplay) -> FinetuneResult:
    if Checkpoints(run).all():
        write_text(run / OPTIONS, options.to_json())  # as told here: data and weights may lie elsewhere by now
        given: dict[str, Any] = {'resume': str(run), 'progress': options.progress}
        with suppress(CheckpointError):  # damaged: then from the start
            return run_finetuning(FinetuneOptions(**given), given, None, open_display)
    shutil.rmtree(run, ignore_errors=True)
    return run_finetuning(options, {}, None, open_display)
