"""One new child, built and run alone on meta tensors: whether it takes what a site would hand it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.meta.layout import Layout, set_layout
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.surgery.sites import AttentionSite, Insertion, Refused, Site, Swap

_META = torch.device('meta')


def try_insertion(operation: Insertion, site: Site) -> int:
    """Builds and runs the new child of an insertion; returns its number of parameters.

    Raises:
        Refused: If it does not work on what it would be handed, or returns another shape.
    """
    form: Any = operation
    return _inserted(form, replace(site, name='', class_name='', attribute=''))


def try_swap(operation: Swap, site: AttentionSite, mask: Any = None) -> int:
    """Builds and runs the new child of a swap; returns its number of parameters.

    Raises:
        Refused: If it does not work on what it would be handed, the mask included.
    """
    form = (tuple(mask.shape), mask.dtype) if isinstance(mask, Tensor) else None
    hashable: Any = operation
    return _swapped(hashable, replace(site, name='', class_name='', attribute=''), form)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape whose first axis is the batch, as text."""
    return '(' + ', '.join(['B', *map(str, shape[1:])]) + ')'


# Sites of equal form take equal children; networks have few forms and many sites.
@lru_cache(maxsize=4096)
def _inserted(operation: Any, site: Site) -> int:
    x = _empty(site.shape, site.dtype)
    inputs = (x, x) if operation.fuses_shortcut and site.position == 'residual' else (x,)
    new, out = _run(operation, site, inputs, shape_text(site.shape))
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = shape_text(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__
        raise Refused(f'{operation} turns {shape_text(site.shape)} into {got}')
    return sum(parameter.numel() for parameter in new.parameters())


@lru_cache(maxsize=4096)
def _swapped(operation: Any, site: AttentionSite, mask: tuple[tuple[int, ...], torch.dtype] | None) -> int:
    shapes = [site.shape, site.key_shape, site.value_shape][: 3 if operation.reads_keys else 1]
    inputs = [_empty(shape, site.dtype) for shape in shapes]
    if mask is not None:
        inputs.append(torch.empty(mask[0], dtype=mask[1], device=_META))
    new, out = _run(operation, site, tuple(inputs), f'queries {site.shape}')
    expected = (*site.shape[:-1], site.value_shape[-1])
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        raise Refused(f'{operation} returns {tuple(getattr(out, "shape", ()))} where {expected} is needed')
    return sum(parameter.numel() for parameter in new.parameters())


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return set_layout(torch.empty(shape, dtype=dtype, device=_META), Layout())


def _run(operation: Any, site: Any, inputs: tuple[Tensor, ...], what: str) -> tuple[nn.Module, Any]:
    try:
        new: nn.Module = operation.build(site, _META, site.dtype).eval()
        with torch.no_grad(), LayoutMode():
            return new, new(*inputs)
    except Exception as error:  # the module is anybody's; that it does not fit here is a reason, not a crash
        raise Refused(f'{operation} does not work on {what}: {type(error).__name__}: {error}') from error
