"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers variants of timm's architectures: ``*_sem`` of all, ``*_ea`` and ``*_eamlp`` where they
have self-attention that can be replaced.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sem_timm.errors import (
    GuardError,
    MissingPackageError,
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
    from sem_timm.finetuning import FinetuneOptions, FinetuneResult, finetune

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
    'FinetuneOptions',
    'FinetuneResult',
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
    'finetune',
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

# Imported when they are first used: they need the packages of the extra 'tools', which take time to import.
_LATER = {
    'FinetuneOptions': 'sem_timm.finetuning',
    'FinetuneResult': 'sem_timm.finetuning',
    'finetune': 'sem_timm.finetuning',
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return getattr(import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"sem_timm.{name} needs {error.name}, which is not installed. Do: pip install 'sem_timm[tools]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_variants()
