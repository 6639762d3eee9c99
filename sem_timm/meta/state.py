"""Attributes of a module beside its tensors and children: what a forward may change as it goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from sem_timm.meta.layout import layout_of

# Attributes that every module has, of torch's own.
INFRASTRUCTURE = frozenset(nn.Module().__dict__)

_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set)


def _is_of_weights(value: Any) -> bool:
    return isinstance(value, Tensor) and layout_of(value) is None


class State:
    """The attributes of a module at one time, with what is in its lists, dictionaries and sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.buffers = dict(module._buffers)
        # Lists, dictionaries and sets may change while they stay the same objects.
        self.contents = {
            name: copy.copy(value)
            for name, value in self.attributes.items()
            if type(value) in _CONTAINERS and name not in INFRASTRUCTURE
        }

    def added(self) -> set[str]:
        """Names of the attributes that are new."""
        return self.module.__dict__.keys() - self.attributes.keys()

    def changed(self, is_memory: Callable[[Any], bool] = _is_of_weights) -> list[str]:
        """Names of the attributes that are others now.

        Args:
            is_memory: Whether an entry of a dictionary is only kept to save computing it again.
        """
        now = self.module.__dict__
        rebound = [name for name, value in self.attributes.items() if not _same(now.get(name), value)]
        return rebound + [
            name
            for name, before in self.contents.items()
            if name not in rebound and _entries(now[name]) != _entries(before)
            if not isinstance(before, dict) or not _only_remembers(before, now[name], is_memory)
        ]

    def rebound(self) -> list[str]:
        """Names of the buffers that are other tensors now, as a traced ``self.count += 1`` leaves one."""
        return [name for name, value in self.buffers.items() if self.module._buffers.get(name) is not value]

    def restore(self) -> None:
        """Undoes all changes."""
        for name in self.added():
            del self.module.__dict__[name]
        self.module.__dict__.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for name, before in self.contents.items():
            container: Any = self.attributes[name]
            if _entries(container) != _entries(before):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)


def outline(module: nn.Module, of_tensor: Callable[[Tensor], Any] = id) -> dict[str, Any]:
    """All that can be told in plain values of the attributes of a module and of those below it, by name.

    What is in lists, dictionaries and other objects counts as far as it is plain; of attributes that are tensors counts
    what ``of_tensor`` says, by default which ones they are.
    """
    return {
        f'{name}.{key}'.lstrip('.'): of_tensor(value) if isinstance(value, Tensor) else plain(value)
        for name, each in module.named_modules()
        for store in (each.__dict__, each._buffers)
        for key, value in store.items()
        if key not in INFRASTRUCTURE
    }


def plain(value: Any, depth: int = 4) -> Any:
    """What of a value can be told in plain values; tensors, which may be kept to save computing them, are left out."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if not depth or value is None or callable(value) or isinstance(value, (Tensor, ModuleType)):
        return None
    if isinstance(value, dict):
        entries = {repr(key): plain(entry, depth - 1) for key, entry in value.items() if isinstance(key, _PLAIN)}
        return {key: entry for key, entry in entries.items() if entry is not None}
    # Of a set the order says nothing, of other collections it does.
    if isinstance(value, Collection):
        return len(value), [plain(entry, depth - 1) for entry in value] if isinstance(value, Sequence) else None
    return plain(getattr(value, '__dict__', None), depth - 1)


def _same(first: Any, second: Any) -> bool:
    if first is second or type(first) is not type(second):
        return first is second
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, _PLAIN) and bool(first == second)


def _entries(container: Any) -> list[int]:
    if isinstance(container, dict):
        return [*map(id, container.keys()), *map(id, container.values())]
    return sorted(map(id, container)) if isinstance(container, set) else [*map(id, container)]


def _only_remembers(before: dict[Any, Any], now: dict[Any, Any], is_memory: Callable[[Any], bool]) -> bool:
    return all(before.get(key) is value or is_memory(value) for key, value in now.items())
