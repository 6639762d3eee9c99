"""Accuracies of one model after another, with a pass over the same images for each."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import batches_for
from sem_timm.attention_transfer.processes import total
from sem_timm.batches import Loader
from sem_timm.errors import OptionError


class Evaluation:
    """Images with labels, on which models are measured.

    Args:
        loader: Yields them; or images alone, of which there is no accuracy.
        first: Its first batches, which tell whether there are labels.
    """

    def __init__(self, loader: Loader, first: list[tuple[Tensor, Any]]) -> None:
        self.loader = loader
        self.has_labels = any(labels is not None for _, labels in first)
        self.num_batches = len(first)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float | None:
        """The part of the images whose class a model names, in percent; None without labels.

        Raises:
            OptionError: If there are fewer batches than before, or labels that are not one class for each image.
        """
        if not self.has_labels:
            return None
        meter = AverageMeter()
        count = 0
        for images, labels in batches_for(self.loader, model):
            classes = classes_of(labels, images, 'evaluation', ' With images alone, errors are measured without it.')
            meter.update(accuracy(model(images), classes)[0].item(), len(images))
            count += 1
        if count < self.num_batches:
            raise OptionError(
                f'evaluation yields {count} batches when passed over again, and yielded {self.num_batches} before; '
                'give one that can be, such as a DataLoader, not a generator.'
            )
        self.num_batches = count
        right, count = total(torch.tensor([meter.sum, meter.count], dtype=torch.float64)).tolist()
        return right / count


def classes_of(labels: Any, images: Tensor, loader: str, way_out: str = '') -> Tensor:
    """Labels as whole numbers (B,), one class for each of some images.

    Args:
        labels: What came with the images as their labels.
        images: The images, (B, C, H, W).
        loader: What yielded them, for the message.
        way_out: What can be done without labels, for the message.

    Raises:
        OptionError: If they are not that.
    """
    try:
        classes = torch.as_tensor(labels, device=images.device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _no_classes(f'of type {type(labels).__name__}', loader, way_out) from error
    is_whole = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    if not is_whole or classes.shape != images.shape[:1]:
        form = f'of shape {tuple(classes.shape)} and {classes.dtype} with {len(images)} images'
        raise _no_classes(form, loader, way_out)
    return classes


def _no_classes(form: str, loader: str, way_out: str) -> OptionError:
    return OptionError(
        f'{loader} yields labels {form}; the class of each image is needed, whole numbers (B,), '
        f'such as labels.argmax(1) of one-hot labels.{way_out}'
    )
