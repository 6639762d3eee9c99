"""What loaders yield, as images and labels; how long they are; and the end of those that run dry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError

_IMAGE_KEYS = ('image', 'images', 'pixel_values', 'input', 'inputs', 'x')
_LABEL_KEYS = ('label', 'labels', 'target', 'targets', 'y')


def images_and_labels(batch: Any, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The images of a batch, on the device and in the type of a model, and its labels where it has any.

    Raises:
        OptionError: If the batch is neither a tensor, nor a pair, nor a dictionary with images.
    """
    images, labels = batch, None
    if isinstance(batch, dict):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor) or images.ndim < 2 or not len(images):
        raise OptionError(
            f'the loader yields {type(batch).__name__}, in which there are no images; '
            'a batch is a tensor (B, C, H, W), a pair of images and labels, or a dictionary with the key "image".'
        )
    weight = next(model.parameters())
    images = images.to(weight.device, weight.dtype)
    return images, labels.to(weight.device) if isinstance(labels, Tensor) else None


def first_batches(loader: Iterable[Any], count: int | None, model: nn.Module) -> list[Tensor]:
    """The images of the first batches of a loader, of all with None.

    Raises:
        OptionError: If there are none.
    """
    found = [images_and_labels(batch, model)[0] for batch in islice(_iterated(loader), count)]
    if not found:
        raise OptionError(
            'the loader yields no batch; attention transfer needs images of the kind that the model is for.'
        )
    return found


def number_of_steps(loader: Iterable[Any], epochs: int, steps: int | None) -> int:
    """How many batches a number of passes is, unless it is given.

    Raises:
        OptionError: If the loader has no length and no number is given.
    """
    if steps is not None:
        return steps
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise OptionError(
            f'{type(loader).__name__} has no length, so that the schedule needs a number of batches: give steps=.'
        ) from error
    return epochs * length


def drawn(loader: Iterable[Any], steps: int, model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A number of batches, from as many passes over a loader as that takes.

    Raises:
        OptionError: If the loader yields nothing, at once or when it is passed over again.
    """
    left = steps
    while left > 0:
        before = left
        for batch in islice(_iterated(loader), left):
            left -= 1
            yield images_and_labels(batch, model)
        if left == before:
            message = (
                'the loader yields no batch'
                if left == steps
                else (
                    f'the loader yields nothing when passed over again, with {left} of {steps} batches to come; '
                    'give one that can be, such as a DataLoader, not a generator'
                )
            )
            raise OptionError(f'{message}.')


def _iterated(loader: Any) -> Iterator[Any]:
    if isinstance(loader, torch.Tensor):
        raise OptionError('the loader is a tensor; give a DataLoader or a list of batches, such as [images].')
    try:
        return iter(loader)
    except TypeError as error:
        raise OptionError(f'the loader is a {type(loader).__name__}, over which one cannot iterate.') from error
