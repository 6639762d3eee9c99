"""What comes out of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sem_timm.finetuning.options import FinetuneOptions


@dataclass(frozen=True)
class FinetuneResult:
    """What came out of a run.

    Attributes:
        model: The trained model, the averaged one with ``ema``.
        options: What the run was told.
        operation: What is in the model, be it by the name of a variant; 'none' if nothing was put in.
        folder: Folder of the run: options, logs, checkpoints, ``model.safetensors`` and ``result.json``; with
            ``train='new'`` also ``patch``, the folder of a patch file with what was trained, if one can hold it.
        before: Accuracy on the validation images before the first update, from 0 to 1.
        after: Accuracy at the end.
        best: Highest accuracy after an epoch.
        best_checkpoint: The checkpoint of that epoch; None if it is gone, which happens when a better one had taken its
            place and the run then went on from before that.
        num_images: Images for training, and those for validation that could be read at the end.
        num_parameters: Parameters of the model.
        num_new_parameters: Those that the operation added.
        num_trained_parameters: Those that were trained.
        num_steps: Updates.
        seconds: Time of this process; of a run that was resumed, since then.
        bad_images: Images that could not be read and were skipped.
        classes: Names of the classes in the order of the model's outputs, where the data tells.
        history: Step, epoch, accuracy, loss and number of images of each measurement.
    """

    model: nn.Module = field(repr=False)
    options: FinetuneOptions = field(repr=False)
    operation: str
    folder: Path
    before: float
    after: float
    best: float
    best_checkpoint: Path | None
    num_images: tuple[int, int]
    num_parameters: int
    num_new_parameters: int
    num_trained_parameters: int
    num_steps: int
    seconds: float
    bad_images: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    history: tuple[dict[str, float], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as data that `json.dumps` takes, without the model."""
        values = {name: value for name, value in vars(self).items() if name not in ('model', 'options')}
        values['folder'] = str(self.folder)
        values['best_checkpoint'] = None if self.best_checkpoint is None else str(self.best_checkpoint)
        told = {'model': self.options.model, 'operation': self.operation, 'data': self.options.data}
        return {**told, **values}
