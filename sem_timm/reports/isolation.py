"""Running a model without leaving a trace in it: on a copy around its own weights."""

from __future__ import annotations

import torch
from torch import nn

from sem_timm.errors import ModelError, OptionError
from sem_timm.meta import shadow
from sem_timm.surgery import check_model


def isolated(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A copy of a model in eval mode and without hooks, around the model's own weights or around copies on a device.

    Modes, hooks and caches of the copy are its own, so the model stays what it is whatever happens to the copy.

    Raises:
        ModelError: If the model is wrapped or has no weights.
        OptionError: If torch knows no such device, or nothing is computed on it.
    """
    _check_device(device)
    check_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f'this {type(model).__name__} has no weights: its parameters are on the meta device.')
    copy = shadow(model)
    return copy if device is None else copy.to(device)


def _check_device(device: torch.device | str | None) -> None:
    try:
        is_meta = device is not None and torch.device(device).type == 'meta'
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device={device!r} is no device that torch knows, such as cpu or cuda:0.') from error
    if is_meta:
        raise OptionError(f'device={device!r} holds no numbers to look at; choose one that computes, such as cpu.')


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is, and so where its inputs go."""
    return next((parameter.device for parameter in model.parameters()), torch.device('cpu'))
