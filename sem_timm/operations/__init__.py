"""Operations: what can be done to a model, and the calls that do it."""

from sem_timm.operations.attention import AttentionConfig
from sem_timm.operations.calls import operation_names, patch_model, plan_model, resolve_operation
from sem_timm.operations.configs import (
    ExcitationConfig,
    ExternalAttention2dConfig,
    InsertConfig,
    InsertionConfig,
    ScaleAndShiftConfig,
    SEMConfig,
    TimmAttentionConfig,
)

__all__ = [
    'AttentionConfig',
    'ExcitationConfig',
    'ExternalAttention2dConfig',
    'InsertConfig',
    'InsertionConfig',
    'SEMConfig',
    'ScaleAndShiftConfig',
    'TimmAttentionConfig',
    'operation_names',
    'patch_model',
    'plan_model',
    'resolve_operation',
]
