"""When two modules are the same for the purpose of tracing: same classes, same plain attributes, same children."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sem_timm.surgery.bytecode import code_of, names_called, surroundings
from sem_timm.surgery.layout import layout_of
from sem_timm.surgery.state import INFRASTRUCTURE
from sem_timm.surgery.walk import modules_by_name

_PLAIN = (bool, int, float, str, type(None))
_SHARED = (FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Local:
    """Identity of an object of one model, which says nothing about those of other models."""

    number: int


class _Any(Enum):
    """What stands in a description for all values of a kind."""

    INTEGER = auto()
    TENSOR = auto()


class Structures:
    """Describes modules of one model; modules with equal descriptions trace to equal graphs.

    Integers of descendants are left out unless the module's own code mentions their names, or no two blocks of
    different width would be equal.
    """

    # Equal for the whole process, so that equal modules of two models have equal descriptions.
    _numbers: ClassVar[dict[Hashable, int]] = {}

    def __init__(self) -> None:
        self._local_numbers: dict[Hashable, _Local] = {}
        self._known: dict[int, int | _Local] = {}
        self._surroundings: dict[type, int | _Local] = {}

    def describe(self, module: nn.Module) -> tuple[Hashable, bool]:
        """What of a module, of its children and of their attributes can steer its forward.

        Returns:
            The description, and whether it holds for this model only.
        """
        mentioned = names_called(type(module)) - INFRASTRUCTURE
        looked_into = tuple(
            (name, key, _exact(child.__dict__[key]))
            for name, child in modules_by_name(module).items()
            if name
            for key in sorted(mentioned & child.__dict__.keys())
        )
        cls, attributes, tensors, children = self._described(module, _exact)
        around = self._around(cls)
        is_local = any(map(_is_local, (attributes, looked_into, children, around)))
        return (code_of(cls), cls, attributes, tensors, children, looked_into, around), is_local

    def _around(self, cls: type) -> int | _Local:
        """A number for what the names in a forward's code stand for, which is looked at once per model."""
        if cls not in self._surroundings:
            self._surroundings[cls] = self._numbered(tuple(map(_meaning, surroundings(cls))))
        return self._surroundings[cls]

    def _number(self, module: nn.Module) -> int | _Local:
        key = id(module)
        if key not in self._known:
            self._known[key] = self._numbered(self._described(module, _without_integers))
        return self._known[key]

    def _numbered(self, description: Hashable) -> int | _Local:
        if _is_local(description):
            return self._local_numbers.setdefault(description, _Local(len(self._local_numbers)))
        return self._numbers.setdefault(description, len(self._numbers))

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
    read = set(names) if mentioned & {'getattr', 'vars', '__dict__'} else mentioned.intersection(names)
    noted = {name for name in read if name.startswith('_surgery_')}  # about a patch, and no forward looks at it
    return tuple(sorted(read - INFRASTRUCTURE - noted))


def _is_local(description: Hashable) -> bool:
    if isinstance(description, tuple):
        return any(map(_is_local, description))
    return type(description) is _Local


def _exact(value: Any) -> Hashable:
    """An attribute as something that is equal for equal behaviour: plain values with their types, since True equals 1.

    Others count by identity.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_exact(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((_exact(key), _exact(entry)) for key, entry in value.items())
    return str(type(value)) if isinstance(value, (Tensor, nn.Module)) else _Local(id(value))


def _meaning(value: Any) -> Hashable:
    """What a name in code stands for, as something that is equal for equal behaviour."""
    function = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
    if isinstance(function, FunctionType):
        return function, function.__code__  # which may change while the function stays
    return value if isinstance(value, (ModuleType, Enum)) or _is_foreign(value) else _exact(value)


def _is_foreign(value: Any) -> bool:
    """Whether a value is something to be called that is no function of Python's, such as a compiled one."""
    return callable(value) and not isinstance(value, nn.Module) and type(value).__hash__ is not None


def _without_integers(value: Any) -> Hashable:
    if type(value) is int:
        return _Any.INTEGER
    return tuple(_without_integers(entry) for entry in value) if isinstance(value, (tuple, list)) else _exact(value)


def call_key(values: dict[str, Any], *, shapes: bool) -> Hashable:
    """What of a call can steer a trace: kinds of arguments and constants, and with ``shapes`` all sizes and layouts."""
    return tuple((name, _argument(value, shapes)) for name, value in values.items())


def _argument(value: Any, shapes: bool) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, layout_of(value)) if shapes else _Any.TENSOR
    if type(value) in (tuple, list):
        return type(value), tuple(_argument(entry, shapes) for entry in value)
    if type(value) is int and not shapes:
        return _Any.INTEGER
    return type(value), value if isinstance(value, _PLAIN) else _Local(id(value))
