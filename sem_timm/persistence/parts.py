"""Whose the tensors of a patched model are: those of new modules, of the head, or of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import ModelError
from sem_timm.surgery import PatchedModule, patched_modules


@dataclass(frozen=True)
class Parts:
    """The tensors of a model's state_dict, by name, in three parts."""

    new: dict[str, Tensor]
    head: dict[str, Tensor]
    base: dict[str, Tensor]


def parts_of(model: nn.Module) -> Parts:
    """Splits the state_dict of a model.

    Raises:
        ModelError: If tensors are on the meta device, spread over processes, or something else is in the state_dict.
    """
    state = model.state_dict()
    check_tensors(model, state)
    modules = patched_modules(model)
    new, head = new_prefixes(model), head_prefixes(model)
    aliases = _aliases_of_new(model, modules)
    parts = Parts({}, {}, {})
    for name, tensor in state.items():
        if name.startswith(new):
            parts.new[name] = tensor
        elif head and name.startswith(head):
            parts.head[name] = tensor
        elif not aliases or not name.startswith(aliases):
            parts.base[name] = tensor
    return parts


def check_tensors(model: nn.Module, state: dict[str, Any]) -> None:
    """Raises ModelError unless a state_dict holds nothing but whole tensors with values."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f'{name} of {type(model).__name__} is a {type(tensor).__name__}, which no patch can hold.')
        if tensor.is_meta:
            raise ModelError(
                f'{name} of {type(model).__name__} is on the meta device and has no values; load them first.'
            )
        if tensor.layout is not torch.strided or type(tensor).__name__ == 'DTensor':
            raise ModelError(f'{name} of {type(model).__name__} is no plain tensor; gather or unpack the model first.')


def new_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of all tensors of new modules begin with."""
    return tuple(f'{part.name}.{child}.' for part in patched_modules(model) for child in part.inserted)


def _aliases_of_new(model: nn.Module, modules: tuple[PatchedModule, ...]) -> tuple[str, ...]:
    """New modules under the other names of a module that the model holds more than once."""
    inserted = {id(model.get_submodule(part.name)): part.inserted for part in modules}
    every = model.named_modules(remove_duplicate=False)
    return tuple(f'{name}.{child}.' for name, m in every for child in inserted.get(id(m), ()))


def head_prefixes(model: Any) -> tuple[str, ...]:
    """What the names of the classifiers' tensors begin with; nothing for models that do not say which they are."""
    if not callable(getattr(model, 'get_classifier', None)):
        return ()
    found = model.get_classifier()
    heads = {id(module) for module in (found if isinstance(found, (tuple, list)) else [found])}
    return tuple(f'{name}.' for name, m in model.named_modules(remove_duplicate=False) if name and id(m) in heads)
