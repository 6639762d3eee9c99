"""JSON that other people wrote: parsed strictly, and read field by field, so that an error names the file and field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sem_timm.errors import PatchFileError, closest

Read = TypeVar('Read')

MAX_BYTES = 64 * 2**20  # a model of ten thousand tensors needs a few of them
MAX_INTEGER = 2**40  # of elements or bytes; whatever counts other things is bounded closer where it is read
_MAX_TEXT = 1024
_MAX_DIGITS = 20
_SHOWN = 60


@dataclass(frozen=True)
class Field:
    """One value of a JSON file, with its place.

    Attributes:
        file: The file it came from.
        place: Its place, such as ``operations[0].options.reduction``; empty for the whole.
        value: What `json` made of it.
    """

    file: Path
    place: str
    value: Any

    def error(self, problem: str) -> PatchFileError:
        """An error that names the file and the field."""
        return PatchFileError(f'{self.file}: {self.place + ": " if self.place else ""}{problem}')

    def fields(self, names: Iterable[str]) -> dict[str, Field]:
        """The fields of an object that must have exactly these."""
        known, found = list(names), self.entries()
        for name in found:
            if name not in known:
                raise self.error(f'field {_shown(name)} is unknown. {closest(name[:_SHOWN], known)}')
        missing = [name for name in known if name not in found]
        if missing:
            raise self.error(f'field {missing[0]!r} is missing.')
        return found

    def entries(self) -> dict[str, Field]:
        """The fields of an object with any names."""
        self._check_type(dict, 'an object {…}')
        at = f'{self.place}.' if self.place else ''
        return {name: Field(self.file, f'{at}{_short(name)}', value) for name, value in self.value.items()}

    def items(self, most: int) -> Iterator[Field]:
        """The entries of a list that must have no more than ``most``."""
        self._check_type(list, 'a list […]')
        if len(self.value) > most:
            raise self.error(f'a list of {len(self.value)} entries; there can be {most} at most.')
        return (Field(self.file, f'{self.place}[{i}]', value) for i, value in enumerate(self.value))

    def texts(self, most: int) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(item.text() for item in self.items(most))

    def integers(self, most: int, low: int, high: int) -> tuple[int, ...]:
        """A list of integers within bounds."""
        return tuple(item.integer(low, high) for item in self.items(most))

    def text(self, choices: Iterable[str] | None = None) -> str:
        """A text, one of ``choices`` if those are given."""
        self._check_type(str, 'a text')
        text: str = self.value
        if len(text) > _MAX_TEXT:
            raise self.error(f'a text of {len(text)} characters; there can be {_MAX_TEXT} at most.')
        if choices is not None and text not in (known := list(choices)):
            raise self.error(f'{_shown(text)} is unknown. {closest(text[:_SHOWN], known)}')
        return text

    def matching(self, pattern: str) -> str:
        """A text that must match a pattern as a whole."""
        text = self.text()
        if re.fullmatch(pattern, text) is None:
            raise self.error(f'{_shown(text)} is not of the form {pattern}')
        return text

    def integer(self, low: int, high: int = MAX_INTEGER) -> int:
        """An integer from ``low`` to ``high``."""
        if type(self.value) is not int:
            raise self.error(f'an integer is needed, not {_shown(self.value)}.')
        if not low <= self.value <= high:
            raise self.error(f'{self.value} is out of range: from {low} to {high}.')
        return self.value

    def optional(self, read: Callable[[Field], Read]) -> Read | None:
        """None for null, else what ``read`` makes of the field."""
        return None if self.value is None else read(self)

    def _check_type(self, cls: type, what: str) -> None:
        if not isinstance(self.value, cls):
            raise self.error(f'{what} is needed, not {_shown(self.value)}.')


def parse(file: Path) -> Field:
    """Parses a file of strict JSON: no NaN or Infinity, no name twice in one object, no number without an end.

    Raises:
        PatchFileError: If the file cannot be read or is something else.
    """
    whole = Field(file, '', None)
    try:
        with file.open('rb') as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise whole.error(f'cannot be read: {error.strerror or error}.') from error
    if len(raw) > MAX_BYTES:
        raise whole.error(f'is longer than {MAX_BYTES:,} bytes, which no patch.json is.')
    try:
        text = raw.decode('utf-8')
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = 'its lists or objects are nested too deeply' if isinstance(error, RecursionError) else str(error)
        raise whole.error(f'is no valid JSON, or was cut off: {reason}.') from error
    return Field(file, '', value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'the field {_shown(name)} stands twice in one object')
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f'{name} is no number in JSON')


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f'the number {digits[:_MAX_DIGITS]} is too large')
    return number


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f'the number {digits[:_MAX_DIGITS]}… has {len(digits)} digits')
    return int(digits)


def _shown(value: Any) -> str:
    text = repr(value[: _SHOWN + 1] if isinstance(value, (str, list)) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + '…'


def _short(name: str) -> str:
    # Names of fields go into messages: one line, and no end of it.
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 2 * _SHOWN else name[: 2 * _SHOWN] + '…'
