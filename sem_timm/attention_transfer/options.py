"""What attention transfer can be told, as one frozen dataclass that a command line can be made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sem_timm.errors import OptionError, closest

STAGES = ('initialize', 'match', 'features', 'distill')
KEYS = ('swap', 'keys', 'queries')
VALUES = ('least-squares', 'means')
INPUTS = ('swapped', 'original')
AMP_DTYPES = ('bfloat16', 'float16')
TARGETS = ('logits', 'labels')
TRAINED = ('new', 'projection', 'module', 'all')

_PREFIXES = ('', 'features_', 'distill_')  # of options that each training has


@dataclass(frozen=True)
class TransferOptions:
    """How a swapped model gets the skill of its original back.

    Attributes:
        stages: Which of 'initialize', 'match', 'features' and 'distill', in this order; by default the first two, or
            'match' alone where the new attention has nothing to initialise.
        calibration_images: How many images memories and maps of values are initialised from, all of them held in
            memory; as many batches as that takes. Thousands are better than hundreds (docs/transfer.md). On the first
            four of the batches errors of layers are measured.
        keys: What the memories of keys start from: 'swap' for what they are already, which measured best with
            values by least squares, 'keys' for centres of the original's keys, 'queries' for centres of its queries.
        values: What the memories of values start from: 'least-squares' for what gives the original's outputs best, or
            'means' for the means of the clusters.
        sharpness: Factors on the memories of keys that are tried; the best is kept for each head.
        iterations: Of k-means.
        inputs: What the maps of values, with ``own=True`` or ``local=True``, are fitted on, layer after layer: the
            inputs that a layer has in the 'swapped' model, or those of the 'original'.
        train: What the layers are matched with: the 'new' parameters, or these and the output 'projection' of each
            swapped module, or all that the 'module' still reads.
        epochs: Passes over the loader when layers are matched.
        steps: Batches drawn then, instead of passes; needed where the loader has no length.
        optimizer: Name of timm's optimizer.
        learning_rate: Its peak for new parameters.
        base_learning_rate: Its peak for weights of the base that are trained beside them: they have been trained, and
            the rate that suits new ones destroys them in a few steps.
        weight_decay: Its weight decay.
        scheduler: Name of timm's schedule, such as 'cosine', or 'constant' for no decay. 'step' divides the rate by 10
            after each third of the steps, 'multistep' after the half and after three quarters.
        warmup: The part of the steps with a rising learning rate. Fitted memories and trained weights are sensitive:
            with a twentieth, the first steps of an adaptive optimizer undo more than the rest wins (docs/transfer.md).
        features_epochs: As ``epochs``, when final features are matched.
        features_steps: As ``steps``, then.
        features_learning_rate: Peak of the learning rate then, for all parameters; it ends at a fifth.
        features_alone: The first part of the steps, in which the swapped modules alone are trained, before all of the
            model is; with 1, the default, the rest of the model stays as it is.
        distill_with: What is aimed at in the distillation: the original's 'logits', or the 'labels' that the loader
            yields.
        distill_layer_weight: Factor of the error of the layers in the loss of the distillation, beside that of its aim;
            0 leaves it out. Where rates were too high for a trained ViT-S, less was lost with 50 than with none.
        distill_train: As ``train``, for the distillation; also 'all' for the whole model. By default as ``train``.
        distill_epochs: As ``epochs``, for the distillation.
        distill_steps: As ``steps``, for the distillation.
        distill_learning_rate: Peak of its learning rate; weights of the base learn at ``base_learning_rate`` if that is
            lower. On a trained ViT-S 1e-3, with 1e-4 for the base, undid in 16 steps what closed form had won.
        temperature: Of the softmax over classes in the distillation.
        amp_dtype: Narrow type that trainings compute in where that is precise enough, 'bfloat16' or 'float16', by
            autocast; faster where the processor has products of that type.
        seed: Of the order of images and the choice of first centres.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    stages: tuple[str, ...] | None = None
    calibration_images: int = 1000
    keys: str = 'swap'
    values: str = 'least-squares'
    sharpness: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    iterations: int = 10
    inputs: str = 'swapped'
    train: str = 'new'
    epochs: int = 1
    steps: int | None = None
    optimizer: str = 'adamw'
    learning_rate: float = 2e-3
    base_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    scheduler: str = 'cosine'
    warmup: float = 0.3
    features_epochs: int = 1
    features_steps: int | None = None
    features_learning_rate: float = 2e-5
    features_alone: float = 1.0
    distill_with: str = 'logits'
    distill_layer_weight: float = 50.0
    distill_train: str | None = None
    distill_epochs: int = 1
    distill_steps: int | None = None
    distill_learning_rate: float = 2e-5
    temperature: float = 2.0
    amp_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('stages', 'sharpness'):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_stages()
        choices = {'keys': KEYS, 'values': VALUES, 'inputs': INPUTS, 'train': TRAINED[:-1], 'distill_train': TRAINED}
        for name, known in {**choices, 'distill_with': TARGETS, 'amp_dtype': AMP_DTYPES}.items():
            value = getattr(self, name)
            if value not in known and not (name in ('distill_train', 'amp_dtype') and value is None):
                raise OptionError(f'{name}={value!r} is unknown. {closest(str(value), known)}')
        if (self.keys, self.values) == ('swap', 'means'):
            raise OptionError("values='means' needs clusters: keys='keys' or keys='queries'.")
        for name in ('calibration_images', 'iterations', *(f'{s}{n}' for s in _PREFIXES for n in ('epochs', 'steps'))):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise OptionError(f'{name}={value!r}: give a whole number of at least 1.')
        rates = (f'{prefix}learning_rate' for prefix in (*_PREFIXES, 'base_'))
        for name in (*rates, 'temperature'):
            if not _is_positive(getattr(self, name)):
                raise OptionError(f'{name}={getattr(self, name)!r}: give a number above 0.')
        for name in ('weight_decay', 'distill_layer_weight'):
            if not _is_zero_or_more(getattr(self, name)):
                raise OptionError(f'{name}={getattr(self, name)!r}: give a number of at least 0.')
        if not self.sharpness or not isinstance(self.sharpness, tuple) or not all(map(_is_positive, self.sharpness)):
            raise OptionError(f'sharpness={self.sharpness!r}: give numbers above 0, such as (1.0, 2.0).')
        if not isinstance(self.warmup, (int, float)) or not 0 <= self.warmup < 1:
            raise OptionError(f'warmup={self.warmup!r}: give a part of the steps, from 0 to below 1.')
        if not _is_zero_or_more(self.features_alone) or self.features_alone > 1:
            raise OptionError(f'features_alone={self.features_alone!r}: give a part of the steps, from 0 to 1.')
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**64:
            raise OptionError(f'seed={self.seed!r}: give a whole number that torch.manual_seed takes, such as 0.')

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        if not isinstance(self.stages, tuple) or not self.stages:
            raise OptionError(f'stages={self.stages!r} is no list of stages, such as {STAGES[:2]}.')
        for stage in self.stages:
            if stage not in STAGES:
                raise OptionError(f'stage {stage!r} is unknown. {closest(str(stage), STAGES)}')
        if self.stages != tuple(stage for stage in STAGES if stage in self.stages):
            raise OptionError(f'stages={self.stages!r}: each once, in the order {", ".join(STAGES)}.')


def _is_positive(value: Any) -> bool:
    return _is_zero_or_more(value) and value != 0


def _is_zero_or_more(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float('inf')
