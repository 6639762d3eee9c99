"""Values as they are typed, as Python's and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import timm

from sem_timm.errors import OptionError
from sem_timm.operations import operation_names

_WORDS = {'true': True, 'false': False, 'none': None}


def parse_pairs(pairs: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Reads ``key=value`` pairs; values are numbers, true, false, none, JSON, ``a,b`` for several, or else text.

    Args:
        pairs: What was typed.
        option: The option it was typed with, for messages.

    Raises:
        OptionError: If something is no pair, or a key is there twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition('=')
        if not equals or not key.isidentifier():
            raise OptionError(f'{option} {pair!r} is not of the form key=value, such as {option} reduction=8.')
        if key in values:
            raise OptionError(f'{option} {key}=... is given twice.')
        values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = json.loads(text)
    except ValueError:
        if ',' in text:
            return tuple(_value(part) for part in text.split(',') if part)
        return text
    return tuple(value) if isinstance(value, list) else value


def parse_target(names: Sequence[str] | None) -> str | tuple[str, ...] | None:
    """One text is a regular expression, several are names; the rules of `plan_model`."""
    if not names:
        return None
    return names[0] if len(names) == 1 else tuple(names)


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin so, for the shell."""
    return timm.list_models(f'{incomplete}*')


def complete_operation(incomplete: str) -> list[str]:
    """Names of operations that begin so, for the shell."""
    return [name for name in operation_names() if name.startswith(incomplete)]
