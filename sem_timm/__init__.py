"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers variants of timm's architectures: ``*_sem`` of all, ``*_ea`` and ``*_eamlp`` where they
have self-attention that can be replaced.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sem_timm.errors import (
    BaseWeightsWarning,
    GuardError,
    ModelError,
    NoMatchError,
    OptionError,
    PatchFileError,
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
    disabled,
    patched,
    trainable_parameters,
    unpatch_model,
)

if TYPE_CHECKING:
    from sem_timm.persistence import load_patch, save_patch

__version__ = '0.1.0'

# Public names of rooms that are only imported when one of them is used.
_LATER = {
    'load_patch': 'sem_timm.persistence',
    'save_patch': 'sem_timm.persistence',
}

__all__ = [
    'SEM',
    'AttentionConfig',
    'AttentionCore',
    'AttentionSite',
    'BaseWeightsWarning',
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
    'PatchFileError',
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
    'disabled',
    'excitation_names',
    'invariance_penalty',
    'load_patch',
    'operation_names',
    'patch_model',
    'patched',
    'plan_model',
    'register_excitation',
    'register_variants',
    'save_patch',
    'trainable_parameters',
    'unpatch_model',
]

register_variants()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
