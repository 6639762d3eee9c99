"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers variants of timm's architectures: ``*_sem`` of all, ``*_ea`` and ``*_eamlp`` where they
have self-attention that can be replaced, ``*_monarch`` where that needs no training.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sem_timm.errors import (
    BaseWeightsWarning,
    GuardError,
    MissingNameError,
    MissingPackageError,
    ModelError,
    NoMatchError,
    OptionError,
    PatchFileError,
    PlanError,
    RefusedError,
    SemTimmError,
    SwapWarning,
    TraceError,
    WeightsError,
)
from sem_timm.layers import (
    SEM,
    AttentionCore,
    CaaMAttention,
    ChannelsFirst,
    CrossSampleAttention,
    EfficientAttention,
    Excitation,
    ExternalAttention,
    ExternalAttention2d,
    HaloAttention,
    LinearAttention,
    MonarchAttention,
    MultiHeadExternalAttention,
    ScaleAndShift,
    excitation_names,
    register_excitation,
)
from sem_timm.registry import register_variants

if TYPE_CHECKING:
    from sem_timm.attention_search import SearchedPlan, search
    from sem_timm.attention_transfer import TransferOptions, TransferResult, transfer
    from sem_timm.comparison import CompareOptions, ComparisonResult, compare
    from sem_timm.finetuning import FinetuneOptions, FinetuneResult, finetune, open_run
    from sem_timm.folding import FoldResult, GateFold, fold_gates
    from sem_timm.operations import (
        AttentionConfig,
        ExcitationConfig,
        ExternalAttention2dConfig,
        InsertConfig,
        ScaleAndShiftConfig,
        SEMConfig,
        TimmAttentionConfig,
        operation_names,
        patch_model,
        plan_model,
    )
    from sem_timm.persistence import load_patch, save_patch
    from sem_timm.reports.attention_map import AttentionMap, attention_map
    from sem_timm.reports.decisions import Decisions, decisions
    from sem_timm.reports.explanation import Explanation, explain
    from sem_timm.reports.summary import Summary, summary
    from sem_timm.surgery import (
        AttentionSite,
        PatchedModule,
        Plan,
        Refusal,
        Site,
        disabled,
        drop_unread_parameters,
        patched_modules,
        trainable_parameters,
        unpatch_model,
    )

__version__ = '0.2.0'

__all__ = [
    'SEM',
    'AttentionConfig',
    'AttentionCore',
    'AttentionMap',
    'AttentionSite',
    'BaseWeightsWarning',
    'CaaMAttention',
    'ChannelsFirst',
    'CompareOptions',
    'ComparisonResult',
    'CrossSampleAttention',
    'Decisions',
    'EfficientAttention',
    'Excitation',
    'ExcitationConfig',
    'Explanation',
    'ExternalAttention',
    'ExternalAttention2d',
    'ExternalAttention2dConfig',
    'FinetuneOptions',
    'FinetuneResult',
    'FoldResult',
    'GateFold',
    'GuardError',
    'HaloAttention',
    'InsertConfig',
    'LinearAttention',
    'MissingNameError',
    'MissingPackageError',
    'ModelError',
    'MonarchAttention',
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
    'ScaleAndShift',
    'ScaleAndShiftConfig',
    'SearchedPlan',
    'SemTimmError',
    'Site',
    'Summary',
    'SwapWarning',
    'TimmAttentionConfig',
    'TraceError',
    'TransferOptions',
    'TransferResult',
    'WeightsError',
    'attention_map',
    'compare',
    'decisions',
    'disabled',
    'drop_unread_parameters',
    'excitation_names',
    'explain',
    'finetune',
    'fold_gates',
    'load_patch',
    'open_run',
    'operation_names',
    'patch_model',
    'patched_modules',
    'plan_model',
    'register_excitation',
    'register_variants',
    'save_patch',
    'search',
    'summary',
    'trainable_parameters',
    'transfer',
    'unpatch_model',
]

# Loaded when first asked for: importing the package stays cheap, and some of it needs the extra 'tools'.
_LAZY = {
    'sem_timm.attention_search': ('SearchedPlan', 'search'),
    'sem_timm.attention_transfer': (
        'TransferOptions',
        'TransferResult',
        'transfer',
    ),
    'sem_timm.comparison': ('CompareOptions', 'ComparisonResult', 'compare'),
    'sem_timm.finetuning': ('FinetuneOptions', 'FinetuneResult', 'finetune', 'open_run'),
    'sem_timm.folding': ('FoldResult', 'GateFold', 'fold_gates'),
    'sem_timm.operations': (
        'AttentionConfig',
        'ExcitationConfig',
        'ExternalAttention2dConfig',
        'InsertConfig',
        'SEMConfig',
        'ScaleAndShiftConfig',
        'TimmAttentionConfig',
        'operation_names',
        'patch_model',
        'plan_model',
    ),
    'sem_timm.persistence': ('load_patch', 'save_patch'),
    'sem_timm.reports': (
        'AttentionMap',
        'Decisions',
        'Explanation',
        'Summary',
        'attention_map',
        'decisions',
        'explain',
        'summary',
    ),
    'sem_timm.surgery': (
        'AttentionSite',
        'PatchedModule',
        'Plan',
        'Refusal',
        'Site',
        'drop_unread_parameters',
        'disabled',
        'patched_modules',
        'trainable_parameters',
        'unpatch_model',
    ),
}


# ``from sem_timm import *`` takes what is there.
_NEEDED = {
    'sem_timm.comparison': ('accelerate', 'rich', 'scipy'),
    'sem_timm.finetuning': ('accelerate', 'rich'),
}
_ABSENT = {name for room, packages in _NEEDED.items() if not all(map(find_spec, packages)) for name in _LAZY[room]}
__all__[:] = [name for name in __all__ if name not in _ABSENT]


def __getattr__(name: str) -> Any:
    room = next((room for room, names in _LAZY.items() if name in names), None)
    if room is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return getattr(import_module(room), name)
    except ModuleNotFoundError as error:
        missing = MissingPackageError(
            f"sem_timm.{name} needs {error.name}, which is not installed. Do: pip install 'sem_timm[tools]'"
        )
        # For ``from sem_timm import name``: of an AttributeError Python would make an error without this advice.
        if sys._getframe(1).f_code.co_name == '_handle_fromlist':
            raise missing from error
        raise MissingNameError(str(missing)) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_variants()
