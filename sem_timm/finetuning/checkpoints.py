"""Checkpoints of a run: complete or not there, the last few and the best, and exactly what a run needs to go on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from sem_timm.finetuning.errors import CheckpointError, first_sentence
from sem_timm.finetuning.files import (
    begin_folder,
    explained,
    finish_folder,
    remove_folder,
    remove_leftovers,
    unfinished_name,
    write_text,
)

_FOLDER, _PREFIX = 'checkpoints', 'step-'
_STATE, _BEST = 'state.json', 'best.json'


@dataclass
class State:
    """How far a run is, beside its tensors.

    Attributes:
        step: Updates done.
        num_processes: Processes that trained.
        before: Accuracy before the first update.
        history: One entry for each measurement: step, epoch, accuracy, loss and number of images.
        bad_images: Names of images that could not be read and were skipped.
    """

    step: int = 0
    num_processes: int = 1
    before: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of a checkpoint of this state; in their order, later ones come last."""
        is_measured = bool(self.history) and self.history[-1]['step'] == self.step
        return _measured_name(self.history[-1]) if is_measured else f'{_PREFIX}{self.step:09d}'

    @property
    def best(self) -> dict[str, float] | None:
        """The measurement with the highest accuracy, the first of several."""
        return max(self.history, key=lambda entry: entry['accuracy'], default=None)


def _measured_name(entry: dict[str, float]) -> str:
    return f'{_PREFIX}{entry["step"]:09.0f}-epoch-{entry["epoch"]:.0f}'


class Checkpoints:
    """The checkpoints in the folder of a run.

    Args:
        run: The folder of the run.
        keep: How many of the last ones are kept, beside the best.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder = run / _FOLDER
        self.keep = keep

    def all(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        return sorted(self.folder.glob(f'{_PREFIX}*'))

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best, if it is there."""
        file = self.folder / _BEST
        path = self.folder / json.loads(file.read_text(encoding='utf-8'))['checkpoint'] if file.exists() else None
        return path if path is not None and path.exists() else None

    def save(self, accelerator: Accelerator, state: State) -> Path:
        """Saves all that `load` gives back; to be called by all processes at the same step.

        Raises:
            WriteError: If it cannot be written; older checkpoints are untouched then.
        """
        folder = self.folder / state.name
        if accelerator.is_main_process:
            with explained(folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            begin_folder(folder)
        accelerator.wait_for_everyone()
        unfinished = unfinished_name(folder)
        try:
            with explained(folder):
                accelerator.save_state(str(unfinished))
                torch.save(_random_states(), unfinished / _random_file(accelerator.process_index))
                if accelerator.is_main_process:
                    (unfinished / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding='utf-8')
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                finish_folder(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if accelerator.is_main_process:
            self._mark_and_prune(state)
        accelerator.wait_for_everyone()
        return folder

    def _mark_and_prune(self, state: State) -> None:
        if state.best and state.best['step'] == state.step:
            self._mark_best(state.best)
        best = self.best()
        for old in self.all()[: -self.keep]:
            if old != best:
                remove_folder(old)

    def _mark_best(self, entry: dict[str, float]) -> None:
        write_text(self.folder / _BEST, json.dumps({'checkpoint': _measured_name(entry), **entry}))

    def go_on_from(self, folder: Path, state: State) -> None:
        """Makes a checkpoint the last one: removes later ones, and marks the best of those before as the best.

        Args:
            folder: The checkpoint.
            state: That of the checkpoint.

        Raises:
            WriteError: If that fails.
        """
        for later in reversed(self.all()):
            if later.name > folder.name:
                with explained(later):
                    remove_folder(later)
        if state.best:
            self._mark_best(state.best)
        else:
            with explained(self.folder / _BEST):
                (self.folder / _BEST).unlink(missing_ok=True)

    def load(self, accelerator: Accelerator, folder: Path) -> State:
        """Gives model, optimizer, average and random numbers of all processes the state they had.

        Raises:
            CheckpointError: If a part of it is missing or damaged, or another number of processes saved it.
        """
        state = read_state(folder)
        if state.num_processes != accelerator.num_processes:
            raise CheckpointError(
                f'{folder} was saved by {state.num_processes} processes, and now there are '
                f'{accelerator.num_processes}; it goes on exactly only with as many as before.'
            )
        with _readable(folder):
            accelerator.load_state(str(folder))
            file = folder / _random_file(accelerator.process_index)
            _set_random_states(torch.load(file, weights_only=True))
        return state


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The run, and the checkpoint in it, that a path means: a run, or one of its checkpoints.

    Raises:
        CheckpointError: If there is none.
    """
    if path.name.startswith(_PREFIX) and path.parent.name == _FOLDER:
        if not path.is_dir():
            raise CheckpointError(f'{path} is not there. There are: {_names(Checkpoints(path.parents[1]))}.')
        return path.parents[1], path
    if not path.is_dir():
        raise CheckpointError(f'{path} is no folder of a run.')
    found = Checkpoints(path).all()
    if not found:
        raise CheckpointError(f'{path} has no complete checkpoint; begin anew, with another --output.')
    return path, found[-1]


def _names(checkpoints: Checkpoints) -> str:
    return ', '.join(folder.name for folder in checkpoints.all()) or 'none'


def read_state(folder: Path) -> State:
    """How far a run was at a checkpoint."""
    with _readable(folder):
        return State(**json.loads((folder / _STATE).read_text(encoding='utf-8')))


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # each of the libraries that read has its own kinds
        others = [path.name for path in Checkpoints(folder.parents[1]).all() if path != folder]
        raise CheckpointError(
            f'checkpoint {folder} is damaged, or of another model: {first_sentence(error)}. '
            f'Others: {", ".join(others) or "none"}.'
        ) from error


def _random_file(process: int) -> str:
    return f'random_numbers_{process}.pt'


def _random_states() -> dict[str, Any]:
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return {
        'python': random.getstate(),
        'numpy': (kind, keys.tolist(), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states['python'])
    kind, keys, *rest = states['numpy']
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    if states['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])
