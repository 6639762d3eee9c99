"""An operation as variants have it: the suffix of their names and the prefix of their options."""

from __future__ import annotations

from dataclasses import dataclass

from sem_timm.errors import OptionError, closest
from sem_timm.layers import TIMM_PREFIX, attention_names, timm_attention_names

_SEM = 'sem'


def variant_operation_names() -> tuple[str, ...]:
    """The operations that variants can be made with, by their short names."""
    return (_SEM, *attention_names(), *(TIMM_PREFIX + name for name in timm_attention_names()))


@dataclass(frozen=True)
class VariantOperation:
    """What the variants that are made with one operation have in common.

    Attributes:
        name: The operation by its short name.

    Raises:
        OptionError: If no variants can be made with the operation.
    """

    name: str

    def __post_init__(self) -> None:
        known = variant_operation_names()
        if self.name not in known:
            raise OptionError(f'no variants can be registered for {self.name!r}. {closest(self.name, known)}')

    @property
    def suffix(self) -> str:
        """What the name of a variant has behind that of its base."""
        return '_ea' if self.name == 'external' else f'_{self.name}'

    @property
    def prefix(self) -> str:
        """What the name of an option has in front of that of `patch_model`."""
        return f'{self.suffix[1:]}_'

    @property
    def changes_outputs(self) -> bool:
        """Whether a variant computes something else than its base, whatever its weights."""
        return self.name != _SEM

    @property
    def keeps_skill(self) -> bool:
        """Whether a variant gives the outputs of its base, or nearly, so that the base's weights are its own."""
        return self.name in (_SEM, 'monarch')

    @property
    def replaces_attention(self) -> bool:
        """Whether a variant has another attention in place of its base's, so that not every base has one."""
        return self.name in attention_names()
