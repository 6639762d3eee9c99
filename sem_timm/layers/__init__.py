"""Layers: pure modules with timm's constructor conventions, usable without any surgery."""

from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.attention_cores import (
    WHOLE_ATTENTION,
    attention_core_class,
    attention_core_names,
    attention_names,
)
from sem_timm.layers.caam import CaaMAttention, invariance_penalty
from sem_timm.layers.cross_sample import CrossSampleAttention
from sem_timm.layers.efficient import EfficientAttention, LinearAttention
from sem_timm.layers.excitation import (
    CircularEfficientChannel,
    EffectiveSqueezeExcitation,
    EfficientChannel,
    InstanceEnhancement,
    LinearContextTransform,
    SqueezeExcitation,
    ZeroableExcitation,
)
from sem_timm.layers.external import ExternalAttention
from sem_timm.layers.external2d import ExternalAttention2d
from sem_timm.layers.gate import ChannelGate
from sem_timm.layers.halo import HaloAttention
from sem_timm.layers.monarch import MonarchAttention
from sem_timm.layers.multi_head_external import MultiHeadExternalAttention
from sem_timm.layers.operators import excitation_names, register_excitation
from sem_timm.layers.scale_and_shift import ScaleAndShift
from sem_timm.layers.sem import SEM, Excitation
from sem_timm.layers.timm_attention import TIMM_PREFIX, ChannelsFirst, timm_attention, timm_attention_names
from sem_timm.layers.with_values import VALUE_OPTIONS, WithValues, check_switches

__all__ = [
    'SEM',
    'TIMM_PREFIX',
    'VALUE_OPTIONS',
    'WHOLE_ATTENTION',
    'AttentionCore',
    'CaaMAttention',
    'ChannelGate',
    'ChannelsFirst',
    'CircularEfficientChannel',
    'CrossSampleAttention',
    'EffectiveSqueezeExcitation',
    'EfficientAttention',
    'EfficientChannel',
    'Excitation',
    'ExternalAttention',
    'ExternalAttention2d',
    'HaloAttention',
    'InstanceEnhancement',
    'LinearAttention',
    'LinearContextTransform',
    'MonarchAttention',
    'MultiHeadExternalAttention',
    'ScaleAndShift',
    'SqueezeExcitation',
    'WithValues',
    'ZeroableExcitation',
    'attention_core_class',
    'attention_core_names',
    'attention_names',
    'check_switches',
    'excitation_names',
    'invariance_penalty',
    'register_excitation',
    'timm_attention',
    'timm_attention_names',
]
