"""sem_timm: better attention in any timm model, in one call, without breaking what is pretrained.

Importing the package registers the ``*_sem`` variants of all of timm's architectures.
"""

from sem_timm.errors import (
    GuardError,
    ModelError,
    NoMatchError,
    OptionError,
    PlanError,
    RefusedError,
    SemTimmError,
    TraceError,
)
from sem_timm.layers import SEM, ChannelsFirst, Excitation, excitation_names, register_excitation
from sem_timm.operations import (
    ExcitationConfig,
    InsertConfig,
    SEMConfig,
    TimmAttentionConfig,
    operation_names,
    patch_model,
    plan_model,
)
from sem_timm.registry import register_variants
from sem_timm.surgery import PatchedModule, Plan, Refusal, Site, patched, unpatch_model

__version__ = '0.1.0'

__all__ = [
    'SEM',
    'ChannelsFirst',
    'Excitation',
    'ExcitationConfig',
    'GuardError',
    'InsertConfig',
    'ModelError',
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
    'TimmAttentionConfig',
    'TraceError',
    'excitation_names',
    'operation_names',
    'patch_model',
    'patched',
    'plan_model',
    'register_excitation',
    'register_variants',
    'unpatch_model',
]

register_variants()
