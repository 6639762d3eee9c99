"""The options of variants: what `create_model` takes of the operation behind a variant."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sem_timm.errors import OptionError
from sem_timm.operations import AttentionConfig, SEMConfig, resolve_operation
from sem_timm.registry.kinds import Kind

_CALL_OPTIONS = ('target', 'exclude', 'input_size')

Options = dict[str, Any]


def pop_options(kind: Kind, name: str, kwargs: Options) -> Options:
    """Takes the options of the operation out of the arguments of the entry point ``name``.

    Raises:
        OptionError: If one is unknown, or as far as it can be told without a model, has an impossible value.
    """
    options = {key.removeprefix(kind.prefix): kwargs.pop(key) for key in list(kwargs) if key.startswith(kind.prefix)}
    given = {key: value for key, value in options.items() if value is not None}  # None is timm's for the default
    if kind.swaps_attention:
        return _checked_for_attention(kind, name, given)
    _check_known(kind, name, options, (*_CALL_OPTIONS, *(field.name for field in fields(SEMConfig))))
    return given


def _check_known(kind: Kind, name: str, options: Options, known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            listed = ', '.join(kind.prefix + option for option in known)
            raise OptionError(f'{name} has no option {kind.prefix + key!r}. There are: {listed}.')


def _checked_for_attention(kind: Kind, name: str, options: Options) -> Options:
    own = {key: _frozen(value) for key, value in options.items() if key not in _CALL_OPTIONS}
    try:
        resolve_operation(kind.operation, **own)
    except OptionError as error:
        general = ', '.join(kind.prefix + option for option in _CALL_OPTIONS)
        raise OptionError(
            f'{name}: {error}\n  In create_model these options have the prefix {kind.prefix}. There are also {general}.'
        ) from error
    return {**options, **own}


def has_tensors(kind: Kind, options: Options) -> bool:
    """Whether the modules of an operation with these options have any weights."""
    own = {key: value for key, value in options.items() if key not in _CALL_OPTIONS}
    return not kind.swaps_attention or AttentionConfig(kind.operation, **own).has_tensors


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # what JSON makes of a tuple
