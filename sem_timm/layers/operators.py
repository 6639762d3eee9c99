"""Excitation operators by name or by class: which exist, how users add their own, how a list of them is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import nn

from sem_timm.errors import OptionError, closest
from sem_timm.layers.attention_cores import attention_names
from sem_timm.layers.excitation import (
    CircularEfficientChannel,
    EffectiveSqueezeExcitation,
    EfficientChannel,
    InstanceEnhancement,
    LinearContextTransform,
    SqueezeExcitation,
    ZeroableExcitation,
)
from sem_timm.layers.timm_attention import TIMM_PREFIX

ExcitationClass: TypeAlias = Callable[..., nn.Module]

PUBLISHED_EXCITATIONS: dict[str, ExcitationClass] = {
    'se': SqueezeExcitation,
    'eca': EfficientChannel,
    'ie': InstanceEnhancement,
    'ceca': CircularEfficientChannel,
    'ese': EffectiveSqueezeExcitation,
    'lct': LinearContextTransform,
}

# The one registry of the package. It only grows, and a name never changes its meaning, so that a name in a saved
# configuration stands for the same class wherever the registering module was imported.
_excitations: dict[str, ExcitationClass] = dict(PUBLISHED_EXCITATIONS)

# Names that patch_model understands in another way; so it does those of attentions.
_OPERATIONS = ('sem', 'ssf', 'external2d')

_CONTRACT = 'class MyExcitation(nn.Module): def __init__(self, channels, device=None, dtype=None)'


def excitation_names() -> tuple[str, ...]:
    """The names that ``operators`` understands, the published ones first."""
    return tuple(_excitations)


def register_excitation(name: str, cls: ExcitationClass) -> None:
    """Make an excitation operator known by name, for this process.

    Registering the same class again under its name changes nothing.

    Args:
        name: A Python identifier; it becomes part of the state_dict keys, and an operation of `patch_model`.
        cls: A class or factory with the arguments ``(channels, device=None, dtype=None)`` that maps (B, C) to (B, C).
            If it also takes ``reduction``, it is handed SEM's. For ``init='identity'`` it needs the method
            ``zero_last_weights()``, see `ZeroableExcitation`.

    Raises:
        OptionError: If the name is no identifier, begins with ``timm_``, is taken by another class or stands for
            another operation, or ``cls`` cannot be called like that.
    """
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise OptionError(f"name={name!r} cannot name an operator: write a plain identifier such as 'my_excitation'.")
    if _excitations.get(name, cls) is not cls:
        raise OptionError(f'name={name!r} already stands for {_excitations[name]!r}; choose another name.')
    if name in (*_OPERATIONS, *attention_names()):
        raise OptionError(f'name={name!r} is an operation of patch_model already; choose another name.')
    if name.startswith(TIMM_PREFIX):
        raise OptionError(f"name={name!r}: names with {TIMM_PREFIX!r} in front are timm's own; choose another name.")
    _check_constructor(cls)
    _excitations[name] = cls


def registered_name(cls: object) -> str | None:
    """The name that a class was registered under, if it was."""
    return next((name for name, known in _excitations.items() if known is cls), None)


def build_operators(
    operators: Sequence[str | ExcitationClass],
    channels: int,
    reduction: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleDict:
    """Build operators in their order, keyed by name; a second one of the same name gets the suffix ``_2``.

    Raises:
        OptionError: If the list is empty or an entry is unknown or unusable.
    """
    if isinstance(operators, str) or not isinstance(operators, Sequence):
        raise OptionError(f"operators={operators!r} is no list of operators. Write operators=('se', 'eca', 'ie').")
    if not operators:
        raise OptionError(f'operators is empty; give at least one. There are: {", ".join(_excitations)}.')
    built = nn.ModuleDict()
    for entry in operators:
        name, cls = _resolve(entry)
        key, count = name, 1
        while key in built:
            count += 1
            key = f'{name}_{count}'
        options = {'reduction': reduction} if _takes_reduction(cls) else {}
        built[key] = cls(channels, device=device, dtype=dtype, **options)
    return built


def check_zeroable(name: str, operator: nn.Module) -> None:
    """Refuse an operator whose logits cannot be made exactly zero.

    Raises:
        OptionError: If it does not offer that.
    """
    if not isinstance(operator, ZeroableExcitation):
        raise OptionError(
            f"init='identity' needs every operator to start at logits of zero, and operator {name!r} "
            f'({type(operator).__name__}) does not say how.\n'
            '  Add a method zero_last_weights(self) that sets its last weights at zero, '
            "or use init='paper', which works without it."
        )


def _resolve(entry: str | ExcitationClass) -> tuple[str, ExcitationClass]:
    """The key and the class that an entry of ``operators`` stands for."""
    if isinstance(entry, str):
        if entry not in _excitations:
            raise OptionError(
                f'excitation operator {entry!r} is unknown. {closest(entry, _excitations)}\n'
                f'  Pass a class of your own instead, or name it first: register_excitation({entry!r}, MyExcitation).'
            )
        return entry, _excitations[entry]
    if isinstance(entry, nn.Module):
        raise OptionError(f'operator {type(entry).__name__} is a module; pass its class, which each SEM builds anew.')
    _check_constructor(entry)
    registered = registered_name(entry)
    if registered is not None:
        return registered, entry
    name = getattr(getattr(entry, 'func', entry), '__name__', type(entry).__name__)
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise OptionError(f'operator {name!r} cannot be a state_dict key; register_excitation gives it a better name.')
    return name, entry


@cache
def _takes_reduction(cls: ExcitationClass) -> bool:
    return 'reduction' in inspect.signature(cls).parameters


def _check_constructor(cls: ExcitationClass) -> None:
    """Refuse what cannot be called with ``(channels, device=None, dtype=None)``."""
    if not callable(cls):
        raise OptionError(f'operator {cls!r} is no name and no class. Names: {", ".join(_excitations)}.')
    try:
        inspect.signature(cls).bind(64, device=None, dtype=None)
    except (TypeError, ValueError) as error:
        name = getattr(cls, '__name__', repr(cls))
        raise OptionError(f'operator {name} cannot be built: {error}.\n  It needs: {_CONTRACT}') from error
