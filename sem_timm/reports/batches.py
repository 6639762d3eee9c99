"""Images and labels out of whatever a loader yields."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sem_timm.errors import OptionError

Loader: TypeAlias = Iterable[Any]

_IMAGE_KEYS = ('image', 'images', 'pixel_values', 'img', 'input', 'inputs', 'x')
_LABEL_KEYS = ('label', 'labels', 'target', 'targets', 'fine_label', 'y')


def labelled_batches(
    loader: Loader, *, with_labels: bool, max_batches: int | None = None
) -> Iterator[tuple[Tensor, list[Hashable] | None]]:
    """The batches of a loader as images (B, C, H, W), with one label each if asked for.

    Args:
        loader: Yields tensors, pairs of images and labels, or dictionaries of both; or is one batch of images.
        with_labels: Whether labels are wanted.
        max_batches: How many batches at most.

    Raises:
        OptionError: If there are no images, or no labels where they are wanted, or they have another form.
    """
    if isinstance(loader, Tensor):
        loader = (loader,)
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, Mapping)):
        raise OptionError(f'loader={loader!r} yields no batches; give a DataLoader, or a list of batches of images.')
    num_images = 0
    for batch in islice(loader, max_batches):
        images, labels = _parts(batch)
        images = _checked(images)
        num_images += len(images)
        if len(images):
            yield images, _one_each(labels, len(images)) if with_labels else None
    if not num_images:
        raise OptionError('the loader yielded no images.')


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        if images is None:
            raise OptionError(
                f'the loader yields dictionaries with {", ".join(map(repr, batch)) or "nothing"}, '
                f'and images are looked for under {", ".join(map(repr, _IMAGE_KEYS))}.'
            )
        return images, next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _checked(images: Any) -> Tensor:
    if not isinstance(images, Tensor):
        raise OptionError(
            f'the loader yields images of type {type(images).__name__}; they are needed as a tensor (B, C, H, W), '
            'as the transform of the model makes them: timm.data.create_transform(**resolve_data_config({}, model=m)).'
        )
    if images.ndim != 4:
        hint = ' Is it a data set? torch.utils.data.DataLoader(dataset, 32) makes batches of it.' * (images.ndim == 3)
        raise OptionError(f'the loader yields images of shape {tuple(images.shape)}; (B, C, H, W) is needed.{hint}')
    if not images.is_floating_point():
        raise OptionError(f'the loader yields images of {images.dtype}; they are needed normalised, as for training.')
    return images


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
