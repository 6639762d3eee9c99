"""Images and labels out of whatever a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from sem_timm.errors import OptionError

Loader: TypeAlias = Iterable[Any]

_IMAGE_KEYS = ('image', 'images', 'pixel_values', 'img', 'input', 'inputs', 'x')
_LABEL_KEYS = ('label', 'labels', 'target', 'targets', 'fine_label', 'y')


def loader_of(given: Any) -> Loader:
    """What was given as a loader; a tensor of images is one batch.

    Raises:
        OptionError: If it yields no batches.
    """
    if isinstance(given, Tensor):
        return (given,)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise OptionError(
            f'the loader is of type {type(given).__name__}, which yields no batches; '
            'give a DataLoader, or a list of batches of images.'
        )
    return given


def read_batches(loader: Loader) -> Iterator[tuple[Tensor, Any]]:
    """The batches of a loader that have images: these (B, C, H, W), and what comes as their labels, or None.

    Args:
        loader: Yields tensors, pairs of images and labels, or dictionaries of both; or is one batch of images.

    Raises:
        OptionError: If there are no images in a batch, or they have another form.
    """
    for batch in loader_of(loader):
        images, labels = _parts(batch)
        images = _checked(images)
        if len(images):
            yield images, labels


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
