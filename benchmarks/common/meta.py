"""timm's architectures, and networks on the meta device without the cost of initial values, which nothing there has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._device import DeviceContext

# What fills a tensor in place. On the meta device torch looks for the shape of each result in Python, for milliseconds.
_FILLS = {'uniform_', 'normal_', 'trunc_normal_', 'erfinv_', 'clamp_', 'fill_', 'zero_', 'constant_'}
_FILLS |= {'kaiming_uniform_', 'kaiming_normal_', 'xavier_uniform_', 'xavier_normal_'}


class _WithoutValues(DeviceContext):  # type: ignore[misc]
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, '__name__', '') in _FILLS:
            filled = args[0] if args else (kwargs or {})['tensor']
            if filled.is_meta:
                return filled
        return super().__torch_function__(func, types, args, kwargs)


def create_on_meta(architecture: str, **options: Any) -> nn.Module:
    """Creates a network of timm on the meta device."""
    with _WithoutValues(torch.device('meta')):
        model: nn.Module = timm.create_model(architecture, **options)
    return model


def own_architectures() -> list[str]:
    """timm's own names, without the variants that sem_timm registers."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.')]
