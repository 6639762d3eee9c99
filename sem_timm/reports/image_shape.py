"""Images of a shape that a model refuses, told in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sem_timm.errors import ModelError, OptionError
from sem_timm.meta import probe


@contextmanager
def explained_shape(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turns what a model raises for images of a shape that it does not take into an error that names both shapes.

    Anything else that goes wrong stays what it is: whether it is the shape is found out on a weightless copy.

    Args:
        model: The model.
        images: What it is run on, (B, C, H, W).

    Raises:
        OptionError: If it is the shape.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        told = _told(model, tuple(images.shape[1:]), str(error).strip().split('\n', 1)[0].rstrip('.'))
        if told is None:
            raise
        raise OptionError(told) from error


def _told(model: nn.Module, given: tuple[int, ...], reason: str) -> str | None:
    """The message, or None if the shape is not what went wrong."""
    try:
        probe(model, given)
    except OptionError:
        pass
    else:
        return None
    try:
        wanted = probe(model).input_size
    except ModelError:  # it runs on nothing that is likely, so that there is no advice
        return None
    text = f'{type(model).__name__} takes images (C, H, W) of {wanted} and was given {given}: {reason}.\n'
    transform = 'timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))'
    if given[0] != wanted[0] or len(given) != len(wanted):
        return f'{text}  {transform} makes images as it takes them.'
    return (
        f'{text}  Resize the image, or create the model for this size: timm.create_model(..., img_size={given[1:]}), '
        'or for any size,\n  where it has that option: dynamic_img_size=True.'
    )
