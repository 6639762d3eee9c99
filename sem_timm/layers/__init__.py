"""Layers: pure modules with timm's constructor conventions, usable without any surgery."""

from sem_timm.layers.excitation import (
    CircularEfficientChannel,
    EffectiveSqueezeExcitation,
    EfficientChannel,
    InstanceEnhancement,
    LinearContextTransform,
    SqueezeExcitation,
    ZeroableExcitation,
)
from sem_timm.layers.gate import GATE_INITS, ChannelGate
from sem_timm.layers.operators import excitation_names, register_excitation
from sem_timm.layers.sem import SEM, Excitation
from sem_timm.layers.timm_attention import ChannelsFirst, timm_attention, timm_attention_names

__all__ = [
    'GATE_INITS',
    'SEM',
    'ChannelGate',
    'ChannelsFirst',
    'CircularEfficientChannel',
    'EffectiveSqueezeExcitation',
    'EfficientChannel',
    'Excitation',
    'InstanceEnhancement',
    'LinearContextTransform',
    'SqueezeExcitation',
    'ZeroableExcitation',
    'excitation_names',
    'register_excitation',
    'timm_attention',
    'timm_attention_names',
]
