"""What a patched module does with a state_dict that has weights for its base, and none for what was put into it.

    layer1.0.conv1.weight, layer1.0.bn1.weight, ...      and no layer1.0.sem.*

Such a state_dict is that of a base, whichever call it comes in by and whatever the module is part of. Of new children
that can be an identity it is completed, so that the outputs are those of the base. Of others it is said.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sem_timm.errors import BaseWeightsWarning, SwapWarning, WeightsError

if TYPE_CHECKING:
    from sem_timm.surgery.rewrite import Edit

State = dict[str, Any]


def loading(edit: Edit) -> Callable[..., None]:
    """The method ``_load_from_state_dict`` of a patched class."""

    def _load_from_state_dict(
        self: Any, state_dict: State, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        _complete(self, edit, state_dict, prefix, missing_keys)
        base: Any = edit.base
        base._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest)

    return _load_from_state_dict


def _complete(module: nn.Module, edit: Edit, state_dict: State, prefix: str, missing_keys: list[str]) -> None:
    """Adds to a state_dict of a base what the new children are to be with it; says where that cannot be."""
    # Not its state_dict(), for which wrappers such as FSDP gather from other processes.
    own: State = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    lacking = [child for child in edit.inserted if not _has(state_dict, f'{prefix}{child}.') and _has(own, f'{child}.')]
    base = _base_keys(module, own)
    if not lacking or not (_given(base, state_dict, prefix) or not base):
        return
    for child in lacking:
        if not all(_is_plain(tensor) for key, tensor in own.items() if key.startswith(f'{child}.')):
            continue  # on the meta device or spread over processes, where nobody can tell what it is
        beside_base = getattr(module._modules[child], 'state_beside_base', None)
        state = None if beside_base is None else beside_base()
        if state is not None:
            state_dict.update({f'{prefix}{child}.{key}': tensor for key, tensor in state.items()})
        elif not any(f'.{child}.' in f'.{key}' for key in missing_keys):  # else it was said of an earlier module
            _say(edit, prefix + child, beside_base is not None, _changes(base, own, state_dict, prefix))


def _has(state: State, start: str) -> bool:
    return any(key.startswith(start) for key in state)


def _base_keys(module: nn.Module, own: State) -> list[str]:
    """The keys of a module that its base has, without those of other patched modules inside of it."""
    new = tuple(
        f'{name}.{child}.'.removeprefix('.')
        for name, inner in module.named_modules()
        for cls in type(inner).__mro__
        for child in getattr(cls.__dict__.get('_surgery_edit'), 'inserted', ())
    )
    return [key for key in own if not key.startswith(new)]


def _given(keys: list[str], state_dict: State, prefix: str) -> list[str]:
    return [key for key in keys if prefix + key in state_dict]


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout is torch.strided


def _changes(base: list[str], own: State, state_dict: State, prefix: str) -> bool:
    """Whether the state_dict has other base weights than the module."""
    for key in _given(base, state_dict, prefix):
        here, there = own[key], state_dict[prefix + key]
        if not (_is_plain(here) and isinstance(there, Tensor) and here.shape == there.shape):
            return True
        if not torch.equal(here, there.detach().to(device=here.device, dtype=here.dtype)):
            return True
    return False


def _say(edit: Edit, name: str, could_be_identity: bool, changes: bool) -> None:
    """A warning about a new child that keeps its values; an error where the caller wants all keys to be there."""
    has = f'the state_dict has weights of the base, and none for {name}'
    if could_be_identity:
        category: type[Warning] = BaseWeightsWarning
        told = (
            f'{has}, which is no identity: it was trained, or asked for otherwise. It and others like it keep their '
            'values, so that the model does not give the outputs of the base.\n'
            "  disabled(model) and unpatch_model(model) give those; reset_parameters('identity') starts a gate anew."
        )
    else:
        category = SwapWarning
        told = (
            f'{has}. {edit.operation} is no identity, so the model gives other outputs than the base and needs '
            'training.\n'
            f'  Best load the weights into the base, and patch that: patch_model(base, {str(edit.operation)!r}) fits '
            'new attention to what it finds. sem_timm.transfer(model, images) lets it learn from the old one.'
        )
    load = _caller_of_load()
    if load is not None and load.f_locals.get('strict', True):
        raise WeightsError(f'{told} load_state_dict(..., strict=False) loads these weights all the same.')
    if changes:
        warnings.warn(told, category, stacklevel=_level_of_caller())


def _caller_of_load() -> FrameType | None:
    """The frame of `torch.nn.Module.load_state_dict`, which alone knows whether keys may be missing."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame


def _level_of_caller() -> int:
    """How far up the line is, for a warning of the calling function, that is no line of torch, timm or this package."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get('__name__', '').partition('.')[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level + 1


_LIBRARIES = ('torch', 'timm', 'safetensors', 'sem_timm')
