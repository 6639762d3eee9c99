"""One label for each image."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

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
    found = _plain(labels) if getattr(labels, 'ndim', 1) == 1 else labels
    is_listed = isinstance(found, Sequence) and not isinstance(found, (str, bytes))
    # One by one too: tensors in a list hash by what they are, not by what they hold.
    found = [_plain(label) for label in found] if is_listed else [found]
    if not is_listed or not all(map(_names_a_class, found)):
        raise OptionError(
            f'by_class=True needs one class per image, a whole number or a name, and the loader yields labels '
            f'{_described(labels)}; leave mixup and one-hot labels out.'
        )
    if len(found) != count:
        raise OptionError(f'by_class=True needs one class per image; there are {len(found)} labels of {count} images.')
    return found


def _plain(value: Any) -> Any:
    """What a tensor or an array holds, as numbers, names or lists of Python."""
    return value.tolist() if hasattr(value, 'tolist') else value


def _names_a_class(label: Any) -> bool:
    try:
        hash(label)
    except TypeError:
        return False
    return not isinstance(label, (float, complex))


def _described(labels: Any) -> str:
    if hasattr(labels, 'shape') and hasattr(labels, 'dtype'):
        return f'of shape {tuple(labels.shape)} and {labels.dtype}'
    return f'of type {type(labels).__name__}' + (f' of {type(labels[0]).__name__}' if isinstance(labels, list) else '')
