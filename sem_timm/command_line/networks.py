"""Models by name, without weights, for commands that only look at them."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from torch import nn

from sem_timm.compat import on_meta
from sem_timm.errors import OptionError, closest
from sem_timm.finetuning.models import input_size, model_arguments
from sem_timm.typed_values import parse_pairs


def open_network(
    name: str, options: Sequence[str] | None, image_size: int | None
) -> tuple[nn.Module, tuple[int, int, int] | None]:
    """A timm model on the meta device, as it was typed, and the shape (C, H, W) of its images if that was.

    Args:
        name: Name of the model.
        options: Its arguments, as ``key=value``.
        image_size: Height and width of the images in pixels.

    Raises:
        OptionError: If there is no such model, or it cannot be created with these options.
    """
    arguments = model_arguments(name, parse_pairs(options, '--model-options'), image_size)
    if not timm.is_model(name.split('.')[0]):
        raise OptionError(f'model {name!r} is unknown. {closest(name, timm.list_models())}')
    try:
        network = on_meta(lambda: timm.create_model(name, **arguments))
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f'model {name!r} cannot be created: {error}') from error
    return network, input_size(network, arguments, image_size) if image_size else None
