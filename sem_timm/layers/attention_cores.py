"""The attention cores by name."""

from __future__ import annotations

from sem_timm.errors import OptionError, closest
from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.causal import CausalAttention
from sem_timm.layers.cross_sample import CrossSampleAttention
from sem_timm.layers.efficient import EfficientAttention, LinearAttention
from sem_timm.layers.external import ExternalAttention
from sem_timm.layers.halo import HaloAttention

_CORES: dict[str, type[AttentionCore]] = {
    'external': ExternalAttention,
    'efficient': EfficientAttention,
    'linear': LinearAttention,
    'halo': HaloAttention,
    'catt': CrossSampleAttention,
    'caam': CausalAttention,
}


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
