"""Configurations of operations as JSON and back: names and numbers only, no classes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from sem_timm.errors import ModelError, OptionError, PatchFileError
from sem_timm.layers.operators import registered_name
from sem_timm.operations import (
    AttentionConfig,
    ExcitationConfig,
    ExternalAttention2dConfig,
    InsertionConfig,
    ScaleAndShiftConfig,
    SEMConfig,
    TimmAttentionConfig,
)
from sem_timm.persistence.strict_json import Field

Config = InsertionConfig | AttentionConfig

_INSERTIONS: dict[str, type[InsertionConfig]] = {
    'sem': SEMConfig,
    'excitation': ExcitationConfig,
    'timm': TimmAttentionConfig,
    'ssf': ScaleAndShiftConfig,
    'external2d': ExternalAttention2dConfig,
}
_ATTENTION = 'attention'

_MAX_NUMBER = 2**20  # of anything an option counts
_MAX_ENTRIES = 64


def config_to_json(config: Config) -> dict[str, Any]:
    """A configuration as data that `json.dumps` takes, from which `config_from_json` makes an equal one.

    Raises:
        ModelError: If it holds a class or function, which a file cannot name, or a value that `config_from_json`
            refuses.
    """
    written = _written(config)
    try:
        config_from_json(Field(Path('patch.json'), '', written))
    except PatchFileError as error:
        raise ModelError(f'the patch {str(config)!r} has what a patch file cannot have: {error}') from error
    return written


def _written(config: Config) -> dict[str, Any]:
    if isinstance(config, AttentionConfig):
        options = {'attention': config.attention, **dict(config.options)}
        return {'operation': _ATTENTION, 'options': {k: _plain(config, k, v) for k, v in options.items()}}
    for name, cls in _INSERTIONS.items():
        if type(config) is cls:
            options = {field.name: getattr(config, field.name) for field in fields(config)}
            return {'operation': name, 'options': {k: _plain(config, k, v) for k, v in options.items()}}
    raise _unnamed(config, type(config).__name__)


def _plain(config: Config, name: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(config, name, entry) for entry in value]
    if callable(value):
        # A registered operator has its name in SEM's state_dict too, so the name stands for the class.
        registered = registered_name(value) if name == 'operators' else None
        if registered is None:
            raise _unnamed(config, f'{name}={getattr(value, "__name__", repr(value))}')
        return registered
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise _unnamed(config, f'{name}={value!r}')
    return value


def _unnamed(config: Config, what: str) -> ModelError:
    return ModelError(
        f'the patch {str(config)!r} is made with code of its own ({what}), and a patch file holds names and numbers '
        'only, so that nothing in it is ever executed.\n'
        "  Give an excitation operator a name, register_excitation('my_operator', MyOperator), and patch with that. "
        'For other classes save model.state_dict(), and load it into a model that the same call has patched.'
    )


def config_from_json(found: Field) -> Config:
    """The configuration that an object with ``operation`` and ``options`` describes.

    Raises:
        PatchFileError: If it describes none; the message names the field.
    """
    parts = {name: field for name, field in found.entries().items() if name in ('operation', 'options')}
    operation = parts['operation'].text((*_INSERTIONS, _ATTENTION))
    options = parts['options'].entries()
    values = {name: _value(field) for name, field in options.items()}
    cls: Any = AttentionConfig if operation == _ATTENTION else _INSERTIONS[operation]
    if operation == _ATTENTION:
        if not isinstance(values.get('attention'), str):
            raise parts['options'].error("'attention' names the attention, such as 'external'.")
    else:
        known = [field.name for field in fields(cls)]
        parts['options'].fields(known)
        for name, field in options.items():
            _check_like(field, values[name], name)
    try:
        config: Config = cls(**values)
        hash(config)
    except OptionError as error:
        raise parts['options'].error(f'{error}') from error
    except Exception as error:  # a layer met a value that it does not check
        raise parts['options'].error(f'{operation} cannot be built: {type(error).__name__}: {error}') from error
    return config


_NUMBERS = ('reduction', 'memory')


def _check_like(field: Field, value: Any, name: str) -> None:
    """Raises PatchFileError unless an option of an insertion has the type that all insertions give it."""
    if name in _NUMBERS:
        field.integer(1, _MAX_NUMBER)
    elif name == 'operators':
        field.texts(_MAX_ENTRIES)
    else:
        field.text()


def _value(field: Field) -> Any:
    if isinstance(field.value, list):
        return tuple(_value(item) for item in field.items(_MAX_ENTRIES))
    if isinstance(field.value, str):
        return field.text()
    if type(field.value) is int:
        return field.integer(-_MAX_NUMBER, _MAX_NUMBER)
    if field.value is None or isinstance(field.value, (bool, float)):
        return field.value
    raise field.error('a number, a text, true, false, null or a list of these is needed.')
