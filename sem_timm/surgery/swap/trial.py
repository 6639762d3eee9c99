"""One new child, built and run alone on meta tensors: whether it takes what a site would hand it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sem_timm.meta.layout import Layout, set_layout
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.surgery.placement import Refused
from sem_timm.surgery.plan import AttentionSite

_Form = tuple[tuple[int, ...], torch.dtype]


def num_parameters_of(operation: Any, site: AttentionSite, mask: Any = None) -> int:
    """Builds and runs the new child of a site; returns its number of parameters.

    Raises:
        Refused: If it does not work on what it would be handed, the mask included.
    """
    form = (tuple(mask.shape), mask.dtype) if isinstance(mask, Tensor) else None
    return _tried(operation, replace(site, name='', class_name='', attribute=''), form)


@lru_cache(maxsize=4096)
def _tried(operation: Any, site: AttentionSite, mask: _Form | None) -> int:
    device = torch.device('meta')
    shapes = [site.shape, site.key_shape, site.value_shape][: 3 if operation.reads_keys else 1]
    try:
        new = operation.build(site, device, site.dtype).eval()
        inputs = [set_layout(torch.empty(shape, dtype=site.dtype, device=device), Layout()) for shape in shapes]
        if mask is not None:
            inputs.append(torch.empty(mask[0], dtype=mask[1], device=device))
        with torch.no_grad(), LayoutMode():
            out = new(*inputs)
    except Exception as error:
        raise Refused(f'{operation} does not work on queries {site.shape}: {type(error).__name__}: {error}') from error
    expected = (*site.shape[:-1], site.value_shape[-1])
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        raise Refused(f'{operation} returns {tuple(getattr(out, "shape", ()))} where {expected} is needed')
    return sum(parameter.numel() for parameter in new.parameters())
