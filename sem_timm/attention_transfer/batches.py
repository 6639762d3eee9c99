"""The batches of a loader as a model takes them; how many there are; and the end of those that run dry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from sem_timm.attention_transfer.processes import fewest
from sem_timm.batches import Loader, loader_of, read_batches
from sem_timm.errors import OptionError


def batches_for(loader: Loader, model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """Images on the device and in the type of a model, and what comes as their labels, or None.

    Raises:
        OptionError: If a batch has no images.
    """
    weight = next(model.parameters())
    for images, labels in read_batches(loader):
        yield images.to(weight.device, weight.dtype), labels


def first_batches(loader: Loader, count: int | None, model: nn.Module) -> list[tuple[Tensor, Any]]:
    """The first batches of a loader, as `batches_for` gives them; all with None.

    Raises:
        OptionError: If there are none.
    """
    found = list(islice(batches_for(loader, model), count))
    _check_some(found)
    return found


def calibration_batches(loader: Loader, num_images: int, model: nn.Module) -> list[tuple[Tensor, Any]]:
    """The first batches of a loader that have so many images together, or all of them, as `batches_for` gives them.

    Raises:
        OptionError: If there are none.
    """
    found: list[tuple[Tensor, Any]] = []
    for batch in batches_for(loader, model):
        found.append(batch)
        if sum(len(images) for images, _ in found) >= num_images:
            break
    _check_some(found)
    return found


def _check_some(batches: Sequence[Any]) -> None:
    if not batches:
        raise OptionError(
            'the loader yields no images; attention transfer needs images of the kind that the model is for.'
        )


def number_of_steps(loader: Loader, epochs: int, steps: int | None) -> int:
    """How many batches a number of passes is, unless it is given.

    Raises:
        OptionError: If the loader has no length and no number is given.
    """
    if steps is not None:
        return steps
    try:
        length = len(loader_of(loader))  # type: ignore[arg-type]
    except TypeError as error:
        raise OptionError(
            f'{type(loader).__name__} has no length, so that the schedule needs a number of batches: give steps=.'
        ) from error
    return fewest(epochs * length)


def drawn(loader: Loader, steps: int, model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """A number of batches, from as many passes over a loader as that takes, not the first over it.

    Raises:
        OptionError: If the loader yields nothing any more.
    """
    left = steps
    while left > 0:
        before = left
        for batch in islice(batches_for(loader, model), left):
            left -= 1
            yield batch
        if left == before:
            raise OptionError(
                f'the loader yields nothing when passed over again, with {left} of {steps} batches to come; '
                'give one that can be, such as a DataLoader, not a generator.'
            )
