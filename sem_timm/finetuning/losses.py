"""Mixing of images, and the loss that goes with it; all timm's."""

from __future__ import annotations

from typing import Any

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.finetuning.options import FinetuneOptions


def create_mixup(options: FinetuneOptions, num_classes: int) -> Any:
    """timm's mixup and cutmix, or None without them."""
    if not options.mixup and not options.cutmix:
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def check_pairs(options: FinetuneOptions, part_size: int) -> None:
    """Raises OptionError if images are to be mixed and a process computes an odd number at a time."""
    if (options.mixup or options.cutmix) and part_size % 2:
        raise OptionError(
            f'mixup and cutmix need an even number of images at a time, not {part_size}; see --batch-size.'
        )


def create_loss(options: FinetuneOptions) -> nn.Module:
    """The loss that goes with mixed or smoothed labels."""
    if options.loss == 'binary-cross-entropy':
        smoothing = 0.0 if options.mixup or options.cutmix else options.smoothing
        return BinaryCrossEntropy(smoothing=smoothing)
    if options.mixup or options.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else nn.CrossEntropyLoss()
