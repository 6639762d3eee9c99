"""When two modules are the same for the purpose of tracing: same classes, same plain attributes, same children."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum, auto
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from sem_timm.meta.layout import layout_of
from sem_timm.meta.state import INFRASTRUCTURE
from sem_timm.surgery.arguments import same_tensors
from sem_timm.surgery.bytecode import code_of, names_called

_PLAIN = (bool, int, float, str, type(None))
_SHARED = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)


class _Any(Enum):
    """What stands in a description for all values of a kind."""

    INTEGER = auto()
    TENSOR = auto()


class Structures:
    """Describes modules of one model; modules with equal descriptions trace to equal graphs.

    Two blocks of a stage differ in no more than their tensors. Two of different width also differ in integers of their
    layers, such as ``in_features``, which are left out: no forward of a block looks at them unless its code has their
    names.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}

    def describe(self, module: nn.Module) -> Hashable:
        """What of a module, of its children and of their attributes can steer its forward."""
        mentioned = names_called(type(module)) - INFRASTRUCTURE
        # A forward may ask self.norm.eps: attributes of descendants count where its code has their names.
        looked_into = tuple(
            (name, key, _exact(child.__dict__[key]))
            for name, child in module.named_modules()
            if name
            for key in sorted(mentioned & child.__dict__.keys())
        )
        return (code_of(type(module)), *self._described(module, _exact), looked_into)

    def _number(self, module: nn.Module) -> int:
        """A number for the description of a child."""
        key = id(module)
        # Children are described once each, and by number in the descriptions of their parents.
        if key not in self._known:
            description = self._described(module, _without_integers)
            self._known[key] = self._numbers.setdefault(description, len(self._numbers))
        return self._known[key]

    def _described(self, module: nn.Module, plain: Callable[[Any], Hashable]) -> tuple[Any, ...]:
        state, cls = module.__dict__, cast(Hashable, type(module))
        read = _attributes_read(cls, code_of(cls), tuple(state))
        attributes = tuple((name, plain(state[name])) for name in read)
        tensors = tuple((k, t is None) for store in ('_parameters', '_buffers') for k, t in state[store].items())
        children = tuple((k, None if m is None else self._number(m)) for k, m in module._modules.items())
        return cls, attributes, tensors, children


@lru_cache(maxsize=4096)
def _attributes_read(cls: Any, code: Hashable, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a module's attributes that its forward may look at."""
    mentioned = names_called(cls)
    # getattr(self, name) may look at any of them.
    read = set(names) if mentioned & {'getattr', 'vars', '__dict__'} else mentioned.intersection(names)
    noted = {name for name in read if name.startswith('_surgery_')}  # about a patch, and no forward looks at it
    return tuple(sorted(read - INFRASTRUCTURE - noted))


def _exact(value: Any) -> Hashable:
    """An attribute as something that is equal for equal behaviour: plain values with their types, since True equals 1.

    Others count by identity, which lasts as long as the model does.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_exact(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((_exact(key), _exact(entry)) for key, entry in value.items())
    return str(type(value)) if isinstance(value, (Tensor, nn.Module)) else id(value)


def _without_integers(value: Any) -> Hashable:
    if type(value) is int:
        return _Any.INTEGER
    return tuple(_without_integers(entry) for entry in value) if isinstance(value, (tuple, list)) else _exact(value)


def call_key(values: dict[str, Any], *, shapes: bool) -> Hashable:
    """What of a call can steer a trace: kinds of arguments and constants, and with ``shapes`` all sizes and layouts."""
    described = tuple((name, _argument(value, shapes)) for name, value in values.items())
    return described, *same_tensors(values).items()


def _argument(value: Any, shapes: bool) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, layout_of(value)) if shapes else _Any.TENSOR
    if type(value) in (tuple, list):
        return type(value), tuple(_argument(entry, shapes) for entry in value)
    if type(value) is int and not shapes:
        return _Any.INTEGER
    return type(value), value if isinstance(value, _PLAIN) else id(value)
