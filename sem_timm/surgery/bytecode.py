"""What a module class's code can do at all, read from its bytecode: it saves most of the tracing."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache, wraps
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sem_timm.meta.vocabulary import SWITCHES, WALKS, WALKS_OF_TENSORS, Kind, names_of, writes_by_name
from sem_timm.surgery.equivalents import forward_of

_Function = TypeVar('_Function', bound=Callable[..., Any])

# Code, and the global names that it sees.
_Scoped = tuple[CodeType, dict[str, Any]]


def _cached(function: _Function) -> _Function:
    """Keeps what a function says of a class until the class gets another forward, as an edited notebook gives it."""
    known = lru_cache(maxsize=4096)(lambda cls, code, *others: function(cls, *others))

    @wraps(function)
    def of(cls: type, *others: Any) -> Any:
        return known(cls, code_of(cls), *others)

    return cast(_Function, of)


def code_of(cls: Any) -> Hashable:
    """What identifies the forward of a module class, or the call of another: code may change while functions stay."""
    forward = forward_of(cls) if hasattr(cls, 'forward') else cls.__call__
    return cast(Hashable, getattr(forward, '__code__', forward))


_LIBRARIES = {'torch', *sys.stdlib_module_names}


@_cached
def may_add(cls: type) -> bool:
    """Whether the forward of a module class, or what it calls by name, contains an addition; others need no trace."""
    codes, names = _run_by(cls, 'forward')
    return bool(names & names_of(Kind.SUM)) or any(
        _is_addition(step) for code, _ in codes for step in dis.get_instructions(code)
    )


@_cached
def may_write(cls: type) -> bool:
    """Whether the forward of a module class, or what it calls by name, writes into a tensor in place."""
    codes, names = _run_by(cls, 'forward')
    return any(writes_by_name(name) and hasattr(torch.Tensor, name) for name in names) or any(
        step.opname.startswith(('INPLACE_', 'STORE_SUBSCR')) or (step.opname == 'BINARY_OP' and '=' in step.argrepr)
        for code, _ in codes
        for step in dis.get_instructions(code)
    )


def _is_addition(step: dis.Instruction) -> bool:
    # BINARY_OP since Python 3.11, BINARY_ADD and INPLACE_ADD before.
    return step.opname in ('BINARY_ADD', 'INPLACE_ADD') or (step.opname == 'BINARY_OP' and step.argrepr in ('+', '+='))


@_cached
def names_called(cls: type) -> frozenset[str]:
    """Names and texts that the forward of a module class mentions, and the methods and functions that it calls.

    What is not among them cannot steer the forward.
    """
    return names_called_by(cls, 'forward')


def names_called_by(cls: type, method: str) -> frozenset[str]:
    """As `names_called`, for another of the class's methods."""
    return _run_by(cls, method)[1]


@_cached
def _run_by(cls: type, method: str) -> tuple[tuple[_Scoped, ...], frozenset[str]]:
    """The code that a method of a class may run, and the names and texts in it."""
    found: list[_Scoped] = []
    waiting, seen = [method], {method}
    # Whatever name occurs may be a method of the class, and what it runs may steer the forward.
    while waiting:
        for function in _definitions(cls, waiting.pop()):
            for code, scope in _reachable(function):
                found.append((code, scope))
                names = {*code.co_names, *(constant for constant in code.co_consts if type(constant) is str)}
                # Whatever name a function was imported under, its own counts too.
                called = (scope.get(name) for name in code.co_names)
                names |= {value.__name__ for value in called if isinstance(value, (BuiltinFunctionType, FunctionType))}
                waiting += names - seen
                seen |= names
    return tuple(found), frozenset(seen)


def surroundings(cls: type) -> Iterator[Any]:
    """What the names in the code of a forward stand for now: globals, attributes of the class, and what closures hold.

    A forward that counts in one of them would change it when it is run for a comparison.
    """
    codes, names = _run_by(cls, 'forward')
    for code, scope in codes:
        yield from _called(code, scope)
    for name in sorted(names):
        for value in (vars(base)[name] for base in cls.__mro__ if base is not nn.Module and name in vars(base)):
            yield name
            yield value
        for function in _definitions(cls, name):
            yield from filter(None, map(_held, function.__closure__ or ()))


def _held(cell: CellType) -> tuple[Any, ...]:
    """What a closure holds, once it holds something."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def switches_in(module: nn.Module) -> set[str]:
    """Names of switches that the forward of a module uses, see `SWITCHES`; an attribute of that name is none."""
    found = names_called(type(module)) & SWITCHES
    codes = _run_by(type(module), 'forward')[0] if found else ()
    return {name for name in found if not all(_means_plain_value(name, code, module) for code, _ in codes)}


def _means_plain_value(name: str, code: CodeType, module: nn.Module) -> bool:
    """Whether a name stands in some code, where it does, for a number, a text or None that a module keeps."""
    path: list[str] = []
    for step in dis.get_instructions(code):
        value = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        if step.opname.startswith('LOAD_FAST') and value == 'self':
            path = ['self']
        elif path and step.opname in ('LOAD_ATTR', 'LOAD_METHOD', 'STORE_ATTR'):
            path.append(value)
        else:  # getattr(self, 'name') is told from the text alone
            path = ['self', name] if step.opname == 'LOAD_CONST' and value == name else []
        if value == name and not (path and isinstance(_kept(module, path[1:]), _PLAIN)):
            return False
    return True


_PLAIN = (bool, int, float, str, type(None))


def _kept(owner: Any, path: list[str]) -> Any:
    """What an object keeps under a name, or an object that it keeps under another."""
    for name in path:
        children = getattr(owner, '_modules', {})
        owner = children[name] if name in children else inspect.getattr_static(owner, name, _kept)
    return owner


def _definitions(cls: type, name: str) -> Iterator[FunctionType]:
    """The function a class has under a name, and those of its bases as far as super() reaches."""
    for base in cls.__mro__:
        if name not in vars(base) or base is nn.Module:
            continue
        value = forward_of(base) if name == 'forward' else vars(base)[name]
        function = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
        if not isinstance(function, FunctionType):
            return
        yield function
        if 'super' not in function.__code__.co_names:
            return


@_cached
def iterates_children(cls: type) -> bool:
    """Whether the forward of a module class may go through its children, whatever they are."""
    return issubclass(cls, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or bool(names_called(cls) & WALKS)


def method_iterates_children(cls: type, method: str) -> bool:
    """Whether a method of a module class may go through its children, or through the tensors that they hold."""
    names = names_called_by(cls, method)
    # Who asks for the next one wants to know a type or a device; the first is no new child's.
    return bool(names & WALKS) or bool(names & WALKS_OF_TENSORS and 'next' not in names)


def _reachable(function: FunctionType) -> Iterator[_Scoped]:
    """The code of a function, of those nested in it, and of those that it calls by name outside of libraries."""
    function = getattr(function, '__wrapped__', function)
    waiting: list[_Scoped] = [(function.__code__, function.__globals__)]
    visited: set[CodeType] = set()
    while waiting:
        code, scope = waiting.pop()
        if code in visited:
            continue
        visited.add(code)
        yield code, scope
        waiting += [(constant, scope) for constant in code.co_consts if isinstance(constant, CodeType)]
        # Functions of libraries are known by their names, and what they call is theirs.
        for called in _called(code, scope):
            if isinstance(called, FunctionType) and str(called.__module__).split('.')[0] not in _LIBRARIES:
                waiting.append((called.__code__, called.__globals__))


def _called(code: CodeType, scope: dict[str, Any]) -> Iterator[Any]:
    """What the names in a code may stand for: globals, and attributes of modules among them."""
    known = [scope[name] for name in code.co_names if name in scope]
    yield from known
    for module in known:
        if isinstance(module, ModuleType) and module.__name__.split('.')[0] not in _LIBRARIES:
            yield from (vars(module)[name] for name in code.co_names if name in vars(module))
