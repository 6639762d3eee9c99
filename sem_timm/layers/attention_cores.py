"""The attentions that can take the place of self-attention, by name."""

from __future__ import annotations

from sem_timm.errors import OptionError, closest
from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.caam import CaaMAttention
from sem_timm.layers.cross_sample import CrossSampleAttention
from sem_timm.layers.efficient import EfficientAttention, LinearAttention
from sem_timm.layers.external import ExternalAttention
from sem_timm.layers.halo import HaloAttention
from sem_timm.layers.monarch import MonarchAttention

_CORES: dict[str, type[AttentionCore]] = {
    'external': ExternalAttention,
    'efficient': EfficientAttention,
    'linear': LinearAttention,
    'halo': HaloAttention,
    'monarch': MonarchAttention,
    'catt': CrossSampleAttention,
    'caam': CaaMAttention,
}

WHOLE_ATTENTION = 'eamlp'  # takes the place of whole modules, with their projections


def attention_names() -> tuple[str, ...]:
    """The names of the attentions that can take the place of self-attention: all cores, and the whole one."""
    return (*_CORES, WHOLE_ATTENTION)


def attention_core_names() -> tuple[str, ...]:
    """The names of the attention cores."""
    return tuple(_CORES)


def attention_core_class(name: str) -> type[AttentionCore]:
    """The class of attention cores of a name.

    Raises:
        OptionError: If the name is unknown; the message lists the closest ones.
    """
    if name not in _CORES:
        raise OptionError(f'attention core {name!r} is unknown. {closest(str(name), _CORES)}')
    return _CORES[name]
