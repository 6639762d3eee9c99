"""What a module class's code can do at all, read from its bytecode: it saves most of the tracing."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ADD_NAMES = {'add', 'add_', '__add__', '__iadd__'}
_LIBRARIES = ('torch', 'math', 'functools', 'itertools', 'typing', 'builtins')


@lru_cache(maxsize=None)
def may_add(cls: type) -> bool:
    """Whether the methods of a module class, or the functions they call by name, contain an addition."""
    return any(
        _ADD_NAMES & set(code.co_names) or any(map(_is_addition, dis.get_instructions(code))) for code in _codes(cls)
    )


@lru_cache(maxsize=None)
def names_read(cls: type) -> frozenset[str]:
    """Names of all attributes that the methods of a module class, or the functions they call by name, mention."""
    return frozenset(name for code in _codes(cls) for name in code.co_names)


@lru_cache(maxsize=None)
def _codes(cls: type) -> tuple[CodeType, ...]:
    found: dict[CodeType, None] = {}
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
            if isinstance(function, FunctionType) and name != '__init__':
                found.update(dict.fromkeys(_reachable(function, found)))
    return tuple(found)


def _reachable(function: FunctionType, seen: dict[CodeType, None]) -> Iterator[CodeType]:
    """The code of a function, of those nested in it, and of those that it calls by name outside of libraries."""
    function = getattr(function, '__wrapped__', function)
    waiting: list[tuple[CodeType, dict[str, Any]]] = [(function.__code__, function.__globals__)]
    visited: set[CodeType] = set(seen)
    while waiting:
        code, scope = waiting.pop()
        if code in visited:
            continue
        visited.add(code)
        yield code
        waiting += [(constant, scope) for constant in code.co_consts if isinstance(constant, CodeType)]
        for name in code.co_names:
            called = scope.get(name)
            if isinstance(called, FunctionType) and called.__module__.split('.')[0] not in _LIBRARIES:
                waiting.append((called.__code__, called.__globals__))


def _is_addition(step: dis.Instruction) -> bool:
    # BINARY_OP since Python 3.11, BINARY_ADD and INPLACE_ADD before.
    return step.opname in ('BINARY_ADD', 'INPLACE_ADD') or (step.opname == 'BINARY_OP' and step.argrepr in ('+', '+='))
