"""Models by name, without weights, for commands that only look at them."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from sem_timm.compat import on_meta
from sem_timm.errors import OptionError, closest


def create_on_meta(name: str, options: dict[str, Any]) -> nn.Module:
    """Creates a timm model on the meta device.

    Raises:
        OptionError: If there is no such model, or it cannot be created with these options.
    """
    if not timm.is_model(name.split('.')[0]):
        raise OptionError(f'model {name!r} is unknown. {closest(name, timm.list_models())}')
    try:
        return on_meta(lambda: timm.create_model(name, **options))
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f'model {name!r} cannot be created: {error}') from error
