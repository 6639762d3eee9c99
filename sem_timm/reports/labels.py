"""One label for each image."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sem_timm.batches import Loader, read_batches
from sem_timm.errors import OptionError


def labelled_batches(
    loader: Loader, *, with_labels: bool, max_batches: int | None = None
) -> Iterator[tuple[Tensor, list[Hashable] | None]]:
    """The batches of a loader as images (B, C, H, W), with one label each if asked for.

    Args:
        loader: What `read_batches` takes.
        with_labels: Whether labels are wanted.
        max_batches: How many batches at most.

    Raises:
        OptionError: If there are no images, or no labels where they are wanted, or they have another form.
    """
    is_empty = True
    for images, labels in islice(read_batches(loader), max_batches):
        is_empty = False
        yield images, _one_each(labels, len(images)) if with_labels else None
    if is_empty:
        raise OptionError('the loader yields no images.')


def _one_each(labels: Any, count: int) -> list[Hashable]:
    if labels is None:
        raise OptionError(
            'by_class=True needs labels, and the loader yields images alone; '
            'let it yield (images, labels), or leave by_class out.'
        )
    if isinstance(labels, Tensor):
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.complex64:
            raise OptionError(
                f'by_class=True needs one class per image, and the loader yields labels of shape '
                f'{tuple(labels.shape)} and {labels.dtype}; leave mixup and one-hot labels out.'
            )
        labels = labels.tolist()
    labels = list(labels)
    if len(labels) != count or not all(isinstance(label, Hashable) for label in labels):
        raise OptionError(f'by_class=True needs one class per image; there are {len(labels)} labels of {count} images.')
    return labels
