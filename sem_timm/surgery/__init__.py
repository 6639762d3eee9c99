"""Finds places in models and edits them; knows nothing of what is put there."""

from sem_timm.surgery.disable import disabled
from sem_timm.surgery.freeze import drop_unread_parameters, trainable_parameters
from sem_timm.surgery.patch import PatchedModule, apply_plan, check_undoable, patched_modules, unpatch_model
from sem_timm.surgery.plan import BRANCHES, POSITIONS, AttentionSite, Insertion, Plan, Refusal, Site, Swap, check_choice
from sem_timm.surgery.planning import check_model, plan_insertion, plan_swap
from sem_timm.surgery.select import Target

__all__ = [
    'BRANCHES',
    'POSITIONS',
    'AttentionSite',
    'Insertion',
    'PatchedModule',
    'Plan',
    'Refusal',
    'Site',
    'Swap',
    'Target',
    'apply_plan',
    'check_choice',
    'check_model',
    'check_undoable',
    'disabled',
    'drop_unread_parameters',
    'patched_modules',
    'plan_insertion',
    'plan_swap',
    'trainable_parameters',
    'unpatch_model',
]
