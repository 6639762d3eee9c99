"""The arguments of a forward, each by how its code says it: ``x``, or ``args[0]`` and ``kwargs['y']``.

A forward with ``*args`` or ``**kwargs`` is read as it was called. Of the call ``block(x, 1, mask=m)`` of

    def forward(self, x, *args, **kwargs): ...

the arguments are ``x``, ``args[0]`` and ``kwargs['mask']``, and the number of the one and the names of the other are
conditions on other calls.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import Tensor

from sem_timm.meta.probing import Call
from sem_timm.surgery.equivalents import forward_of

_POSITIONS, _NAMES = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def forward_signature(cls: type) -> inspect.Signature:
    """The signature of a module class's forward, without ``self`` and as written (annotations not evaluated)."""
    signature = inspect.signature(forward_of(cls), follow_wrapped=False)
    own, *others = signature.parameters.values()
    # A decorator may have left nothing but *args, which holds more than ``self``.
    kept = [own, *others] if own.kind is _POSITIONS else others
    return signature.replace(parameters=kept)


def bind(signature: inspect.Signature, call: Call) -> dict[str, Any]:
    """The value of every argument in a call, defaults included."""
    bound = signature.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is _POSITIONS:
            values.update((f'{name}[{place}]', entry) for place, entry in enumerate(value))
        elif kind is _NAMES:
            values.update((f'{name}[{key!r}]', entry) for key, entry in value.items())
        else:
            values[name] = value
    return values


def passed(signature: inspect.Signature, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What to call a forward with, by place and by name, so that its arguments have some values."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        entries = {key: value for key, value in values.items() if key.startswith(f'{name}[')}
        if parameter.kind is _POSITIONS:
            args += entries.values()
        elif parameter.kind is _NAMES:
            kwargs.update((key[len(name) + 2 : -2], value) for key, value in entries.items())
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = values[name]
        else:
            args.append(values[name])
    return args, kwargs


def conditions(cls: type, values: dict[str, Any]) -> Iterator[str]:
    """What must hold of ``*args`` and ``**kwargs`` of a forward that looks at them, so that a call is like this one."""
    for name, parameter in forward_signature(cls).parameters.items():
        given = [key for key in values if key.startswith(f'{name}[')]
        if parameter.kind not in (_POSITIONS, _NAMES) or not _reads(forward_of(cls).__code__, name):
            continue
        if not given:
            yield f'not {name}'
        elif parameter.kind is _POSITIONS:
            yield f'len({name}) == {len(given)}'
        else:
            yield f'{name}.keys() == {{{", ".join(key[len(name) + 1 : -1] for key in given)}}}'


def same_tensors(values: dict[str, Any]) -> dict[str, str]:
    """The arguments that are a tensor which an argument before them is as well, with that one."""
    first: dict[int, str] = {}
    tensors = {name: id(value) for name, value in values.items() if isinstance(value, Tensor)}
    for name, key in tensors.items():
        first.setdefault(key, name)
    return {name: first[key] for name, key in tensors.items() if first[key] != name}


def _reads(code: CodeType, name: str) -> bool:
    """Whether some code, or what is nested in it, reads a variable."""
    loads = (step for step in dis.get_instructions(code) if step.opname.startswith('LOAD_'))
    names = (step.argval if isinstance(step.argval, tuple) else (step.argval,) for step in loads)
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(name in each for each in names) or any(_reads(constant, name) for constant in nested)
