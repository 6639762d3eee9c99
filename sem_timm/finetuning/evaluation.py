"""Accuracy and loss over all validation images, of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from sem_timm.finetuning.loading import ValidationLoader


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: ValidationLoader,
    prepare: Callable[[Any], Any],
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Measures a model in evaluation mode, and leaves it in that mode.

    Args:
        accelerator: Collects what the processes found.
        model: The model.
        loader: The images.
        prepare: Puts images into the memory layout of the model.
        stop: Asked after each batch, whether all processes agree to stop.

    Returns:
        Accuracy from 0 to 1, mean cross entropy, and the number of images that could be read; None if it was stopped.
    """
    model.eval()
    dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64  # which Apple's GPUs have not
    sums = torch.zeros(3, dtype=dtype, device=accelerator.device)
    for images, labels, count in loader:
        with accelerator.autocast():
            logits = model(prepare(images))
        measured = labels[:count] >= 0  # others stand for images that could not be read
        logits, labels = logits[:count][measured].float(), labels[:count][measured]
        sums[0] += (logits.argmax(-1) == labels).sum()
        sums[1] += F.cross_entropy(logits, labels, reduction='sum')
        sums[2] += len(labels)
        if stop():
            return None
    correct, loss, count = accelerator.reduce(sums, 'sum').tolist()
    return {'accuracy': correct / max(count, 1), 'loss': loss / max(count, 1), 'images': count}
