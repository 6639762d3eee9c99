"""Kinds of variants: an operation, the suffix of its architectures and the prefix of its options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sem_timm.errors import OptionError, closest
from sem_timm.operations import AttentionConfig, SEMConfig, attention_kinds

_SEM = 'sem'
_CALL_OPTIONS = ('target', 'exclude', 'input_size')

Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a group of variants has in common.

    Attributes:
        operation: The operation by its short name.

    Raises:
        OptionError: If no variants can be made with the operation.
    """

    operation: str

    def __post_init__(self) -> None:
        known = (_SEM, *attention_kinds())
        if self.operation not in known:
            raise OptionError(f'no variants can be registered for {self.operation!r}. {closest(self.operation, known)}')

    @property
    def suffix(self) -> str:
        """What the name of a variant has behind that of its base."""
        return '_ea' if self.operation == 'external' else f'_{self.operation}'

    @property
    def prefix(self) -> str:
        """What the name of an option has in front of that of `patch_model`."""
        return f'{self.suffix[1:]}_'

    @property
    def swaps_attention(self) -> bool:
        """Whether a variant computes something else than its base, whatever its weights."""
        return self.operation != _SEM

    @property
    def attribute(self) -> str:
        """What the children are called that a variant has and its base has not; several in one module are numbered."""
        return AttentionConfig(self.operation).attribute if self.swaps_attention else SEMConfig().attribute

    def pop_options(self, name: str, kwargs: Options) -> Options:
        """Takes the options of the operation out of the arguments of the entry point ``name``.

        Raises:
            OptionError: If one is unknown, or as far as it can be told without a model, has an impossible value.
        """
        options = {
            key.removeprefix(self.prefix): kwargs.pop(key) for key in list(kwargs) if key.startswith(self.prefix)
        }
        given = {key: value for key, value in options.items() if value is not None}  # None is timm's for the default
        if self.swaps_attention:
            return self._checked_for_attention(name, given)
        self._check_known(name, options, (*_CALL_OPTIONS, *(field.name for field in fields(SEMConfig))))
        return given

    def _check_known(self, name: str, options: Options, known: tuple[str, ...]) -> None:
        for key in options:
            if key not in known:
                listed = ', '.join(self.prefix + option for option in known)
                raise OptionError(f'{name} has no option {self.prefix + key!r}. There are: {listed}.')

    def _checked_for_attention(self, name: str, options: Options) -> Options:
        own = {key: _frozen(value) for key, value in options.items() if key not in _CALL_OPTIONS}
        try:
            AttentionConfig(self.operation, **own)
        except OptionError as error:
            general = ', '.join(self.prefix + option for option in _CALL_OPTIONS)
            raise OptionError(
                f'{name}: {error}\n  In create_model these options have the prefix {self.prefix}. '
                f'There are also {general}.'
            ) from error
        return {**options, **own}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # what JSON makes of a tuple
