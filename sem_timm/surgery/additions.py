"""Whether a class's code can add two tensors at all, read from its bytecode: most need not be traced to know."""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_NAMES = {'add', 'add_', '__add__', '__iadd__'}
_LIBRARIES = ('torch', 'math', 'functools', 'itertools', 'typing', 'builtins')


@lru_cache(maxsize=None)
def may_add(cls: type) -> bool:
    """Whether the methods of a module class, or the functions they call by name, contain an addition."""
    seen: set[CodeType] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        for value in vars(base).values():
            function = getattr(value, '__func__', value)
            if isinstance(function, FunctionType) and function.__name__ != '__init__' and _adds(function, seen):
                return True
    return False


def _adds(function: FunctionType, seen: set[CodeType]) -> bool:
    code = getattr(function, '__wrapped__', function).__code__
    return _code_adds(code, function.__globals__, seen)


def _code_adds(code: CodeType, scope: dict[str, Any], seen: set[CodeType]) -> bool:
    if code in seen:
        return False
    seen.add(code)
    if _NAMES & set(code.co_names) or any(_is_addition(step) for step in dis.get_instructions(code)):
        return True
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    called = [scope.get(name) for name in code.co_names]
    own = [f for f in called if isinstance(f, FunctionType) and f.__module__.split('.')[0] not in _LIBRARIES]
    return any(_code_adds(inner, scope, seen) for inner in nested) or any(_adds(f, seen) for f in own)


def _is_addition(step: dis.Instruction) -> bool:
    # BINARY_OP since Python 3.11, BINARY_ADD and INPLACE_ADD before.
    return step.opname in ('BINARY_ADD', 'INPLACE_ADD') or (step.opname == 'BINARY_OP' and step.argrepr in ('+', '+='))
