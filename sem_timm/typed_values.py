"""Values as they are typed, as Python's."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from sem_timm.errors import OptionError

# What begins so can only be a literal: a name or a number cannot.
_LITERAL = ('(', '[', '{', '"', "'")
_WORDS = {'true': True, 'false': False, 'none': None}


def parse_pairs(pairs: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Reads ``key=value`` pairs.

    A value is a number, true, false, none, ``a,b`` for several, JSON, a Python literal such as ``('a', 'b')``, or text.

    Args:
        pairs: What was typed.
        option: The option it was typed with, for messages.

    Raises:
        OptionError: If something is no pair, a key is there twice, or a bracket or quote in a value is not closed.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition('=')
        if not equals or not key.isidentifier():
            raise OptionError(f'{option} {pair!r} is not of the form key=value, such as {option} reduction=8.')
        if key in values:
            raise OptionError(f'{option} {key}=... is given twice.')
        try:
            values[key] = _value(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise OptionError(
                f'{option} {pair!r}: the value is neither JSON nor a Python literal. Several names are typed as '
                f'{option} {key}=a,b, and text with brackets in quotes: {option} "{key}=\'(a)\'".'
            ) from error
    return values


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = json.loads(text)
    except ValueError:
        if text.startswith(_LITERAL):
            value = ast.literal_eval(text)
        elif ',' in text:
            return tuple(_value(part) for part in text.split(',') if part.strip())
        else:
            value = _number_or_text(text)
    return tuple(value) if isinstance(value, list) else value


def _number_or_text(text: str) -> Any:
    """A number in one of the spellings that JSON has not, such as ``.5``; or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
