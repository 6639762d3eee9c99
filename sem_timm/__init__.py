"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers variants of timm's architectures: ``*_sem`` of all, ``*_ea`` and ``*_eamlp`` where they
have self-attention that can be replaced.
"""

from sem_timm.errors import (
    GuardError,
    ModelError,
    NoMatchError,
    OptionError,
    PlanError,
    RefusedError,
    SemTimmError,
    SwapWarning,
    TraceError,
)
from sem_timm.layers import (
    SEM,
    AttentionCore,
    CausalAttention,
    ChannelsFirst,
    CrossSampleAttention,
    EfficientAttention,
    Excitation,
    ExternalAttention,
    ExternalAttention2d,
    HaloAttention,
    LinearAttention,
    MultiHeadExternalAttention,
    excitation_names,
    invariance_penalty,
    register_excitation,
)
from sem_timm.operations import (
    AttentionConfig,
    ExcitationConfig,
    ExternalAttention2dConfig,
    InsertConfig,
    SEMConfig,
    TimmAttentionConfig,
    operation_names,
    patch_model,
    plan_model,
)
from sem_timm.registry import register_variants
from sem_timm.surgery import (
    AttentionSite,
    PatchedModule,
    Plan,
    Refusal,
    Site,
    compact_model,
    patched,
    trainable_parameters,
    unpatch_model,
)

__version__ = '0.1.0'

__all__ = [
    'SEM',
    'AttentionConfig',
    'AttentionCore',
    'AttentionSite',
    'CausalAttention',
    'ChannelsFirst',
    'CrossSampleAttention',
    'EfficientAttention',
    'Excitation',
    'ExcitationConfig',
    'ExternalAttention',
    'ExternalAttention2d',
    'ExternalAttention2dConfig',
    'GuardError',
    'HaloAttention',
    'InsertConfig',
    'LinearAttention',
    'ModelError',
    'MultiHeadExternalAttention',
    'NoMatchError',
    'OptionError',
    'PatchedModule',
    'Plan',
    'PlanError',
    'Refusal',
    'RefusedError',
    'SEMConfig',
    'SemTimmError',
    'Site',
    'SwapWarning',
    'TimmAttentionConfig',
    'TraceError',
    'compact_model',
    'excitation_names',
    'invariance_penalty',
    'operation_names',
    'patch_model',
    'patched',
    'plan_model',
    'register_excitation',
    'register_variants',
    'trainable_parameters',
    'unpatch_model',
]

register_variants()
