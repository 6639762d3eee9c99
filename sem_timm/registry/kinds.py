"""Kinds of variants: an operation, the suffix of its architectures and the prefix of its options."""

from __future__ import annotations

from dataclasses import dataclass

from sem_timm.errors import OptionError, closest
from sem_timm.layers import attention_kinds

_SEM = 'sem'


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
