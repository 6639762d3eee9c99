"""The options of variants: what `create_model` takes of the operation behind a variant."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sem_timm.errors import OptionError
from sem_timm.operations import AttentionConfig, SEMConfig, TimmAttentionConfig, resolve_operation
from sem_timm.registry.variant_operation import VariantOperation

_CALL_OPTIONS = ('target', 'exclude', 'input_size')

Options = dict[str, Any]


def pop_options(operation: VariantOperation, name: str, kwargs: Options) -> Options:
    """Takes the options of the operation out of the arguments of the entry point ``name``.

    Raises:
        OptionError: If one is unknown, or as far as it can be told without a model, has an impossible value.
    """
    prefix = operation.prefix
    options = {key.removeprefix(prefix): kwargs.pop(key) for key in list(kwargs) if key.startswith(prefix)}
    given = {key: value for key, value in options.items() if value is not None}  # None is timm's for the default
    if operation.changes_outputs:
        return _checked(operation, name, given)
    _check_known(operation, name, options, (*_CALL_OPTIONS, *(field.name for field in fields(SEMConfig))))
    return given


def _check_known(operation: VariantOperation, name: str, options: Options, known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            listed = ', '.join(operation.prefix + option for option in known)
            raise OptionError(f'{name} has no option {operation.prefix + key!r}. There are: {listed}.')


def _checked(operation: VariantOperation, name: str, options: Options) -> Options:
    own = {key: _frozen(value) for key, value in options.items() if key not in _CALL_OPTIONS}
    try:
        resolve_operation(operation.name, **own)
    except OptionError as error:
        general = ', '.join(operation.prefix + option for option in _CALL_OPTIONS)
        raise OptionError(
            f'{name}: {error}\n  In create_model these options have the prefix {operation.prefix}. '
            f'There are also {general}.'
        ) from error
    return {**options, **own}


def has_tensors(operation: VariantOperation, options: Options) -> bool:
    """Whether the modules of an operation with these options have any weights."""
    own = {key: value for key, value in options.items() if key not in _CALL_OPTIONS}
    config = resolve_operation(operation.name, **own)
    return config.has_tensors if isinstance(config, (AttentionConfig, TimmAttentionConfig)) else True


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # what JSON makes of a tuple
