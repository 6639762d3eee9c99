"""A finished run, opened again: its model with the trained weights, and its images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from sem_timm.finetuning.datasets import Data
from sem_timm.finetuning.errors import CheckpointError, DataError, first_sentence
from sem_timm.finetuning.files import OPTIONS, RESULT, WEIGHTS
from sem_timm.finetuning.loading import TrainingLoader, ValidationLoader
from sem_timm.finetuning.models import operate
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.parts import create_accelerator, data_and_model
from sem_timm.finetuning.samples import LabelCheck, Samples
from sem_timm.finetuning.sampling import Share


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        options: What it was told.
        model: Its model with the trained weights, in eval mode.
        training: Its training images in batches, augmented as then: pairs of images and labels.
        validation: Its validation images in batches.
        input_size: Shape (C, H, W) of an image.
        classes: Names of the classes in the order of the labels, where data or run tell.
    """

    options: FinetuneOptions
    model: nn.Module
    training: Images
    validation: Images
    input_size: tuple[int, int, int]
    classes: tuple[str, ...] = ()


class Images:
    """Pairs of images and labels, as often as they are asked for; in another order each time if they are augmented."""

    def __init__(self, loader: TrainingLoader | ValidationLoader) -> None:
        self._loader = loader
        self._epoch = 0

    def __len__(self) -> int:
        return self._loader.num_updates if isinstance(self._loader, TrainingLoader) else len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._loader, TrainingLoader):
            self._epoch += 1
            # A stream has no end.
            yield from islice(self._loader.parts(self._epoch - 1, 0), len(self))
            return
        for images, labels, count in self._loader:
            readable = labels[:count] >= 0
            yield images[:count][readable], labels[:count][readable]


def open_run(folder: str | os.PathLike[str], *, data: str | None = None) -> Run:
    """Opens the folder of a run of `finetune`.

    Args:
        folder: The folder.
        data: Other images than those of the run, named as there. Their classes are known by name, and may be some of
            those of the run.

    Returns:
        The run: its options, the trained model in eval mode, and its images.

    Raises:
        CheckpointError: If the folder is not that of a finished run.
        DataError: If other images have classes that the run does not know.
        SemTimmError: If the model or the images cannot be had.
    """
    folder = Path(folder)
    options, known = _options(folder), _classes(folder)
    if data is not None:
        options = replace(options, data=data, num_classes=options.num_classes or len(known) or None)
    # Nothing is downloaded, as the weights are those of the run, and nothing is trained.
    plain = replace(options, pretrained=False, weights=None, precision='no', sync_bn=False, batch_size=1, accumulate=1)
    accelerator = create_accelerator(plain)
    found, model, config = data_and_model(plain, options.batch_size)
    if data is not None:
        _renumber(found, known)
    operate(model, options, config['input_size'])
    try:
        load_model(model, str(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f'{folder / WEIGHTS} does not hold the weights of {options.model} as this run made it: '
            f'{first_sentence(error)}. Those of a network of your own go into it by safetensors.torch.load_model.'
        ) from error
    model = model.to(accelerator.device).eval()
    size = min(options.batch_size, len(found.train)) if isinstance(found.train, Samples) else options.batch_size
    share = Share(0, 1, size, 1)
    training = TrainingLoader(found, options, config, share, accelerator.device)
    validation = ValidationLoader(found, options, config, share, accelerator.device)
    return Run(options, model, Images(training), Images(validation), config['input_size'], known or found.classes)


def _renumber(data: Data, known: tuple[str, ...]) -> None:
    """Gives the classes of other data the numbers that they have in the run, where names tell."""
    if not (data.classes and known) or data.classes == known:
        return
    strange = [name for name in data.classes if name not in known]
    if strange:
        raise DataError(
            f'{data.name} has classes that the run does not know: {", ".join(strange[:5])}. It knows '
            f'{", ".join(known[:5])}{", ..." if len(known) > 5 else ""}.'
        )
    numbers = tuple(known.index(name) for name in data.classes)
    for samples in (data.train, data.validation):
        samples.check = LabelCheck(data.name, len(numbers), numbers)


def _classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes that a run has noted; a stream does not tell them again."""
    try:
        return tuple(json.loads((folder / RESULT).read_text(encoding='utf-8'))['classes'])
    except (OSError, ValueError, KeyError, TypeError):  # such as of a transfer, which leaves weights alone
        return ()


def _options(folder: Path) -> FinetuneOptions:
    path = folder / OPTIONS
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f'{folder} is not the folder of a finished run: it has no {OPTIONS} or no {WEIGHTS}. '
            'Make one: sem-timm finetune --output FOLDER'
        )
    return FinetuneOptions.from_json(path.read_text(encoding='utf-8'))
