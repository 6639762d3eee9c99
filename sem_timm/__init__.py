"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers variants of timm's architectures: ``*_sem`` of all, ``*_ea`` and ``*_eamlp`` where they
have self-attention that can be replaced.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sem_timm.attention_transfer import (
        TransferOptions,
        TransferResult,
        initialize_memories,
        match_layers,
        transfer,
    )

__version__ = '0.1.0'

# Public names of rooms that are only imported when one of them is used.
_LATER = {
    'TransferOptions': 'sem_timm.attention_transfer',
    'TransferResult': 'sem_timm.attention_transfer',
    'initialize_memories': 'sem_timm.attention_transfer',
    'match_layers': 'sem_timm.attention_transfer',
    'transfer': 'sem_timm.attention_transfer',
}

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
    'TransferOptions',
    'TransferResult',
    'compact_model',
    'excitation_names',
    'initialize_memories',
    'invariance_penalty',
    'match_layers',
    'operation_names',
    'patch_model',
    'patched',
    'plan_model',
    'register_excitation',
    'register_variants',
    'trainable_parameters',
    'transfer',
    'unpatch_model',
]

register_variants()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
