"""Finds places in models and edits them; knows nothing of what is put there."""

from sem_timm.surgery.disable import disabled
from sem_timm.surgery.evaluate import first_tensor
from sem_timm.surgery.freeze import check_not_compact, drop_unread_parameters, trainable_parameters, unread_parameters
from sem_timm.surgery.patch import Built, PatchedModule, apply_plan, check_undoable, patched_modules, unpatch_model
from sem_timm.surgery.plan import BRANCHES, POSITIONS, AttentionSite, Insertion, Plan, Refusal, Site, Swap, check_choice
from sem_timm.surgery.planning import check_model, plan_insertion, plan_swap
from sem_timm.surgery.reading import bound_arguments
from sem_timm.surgery.rewrite import Edit, edit_of, patched_class, put_back
from sem_timm.surgery.select import Target
from sem_timm.surgery.swap.original import Computed, Original
from sem_timm.surgery.swap.whole import WholeSite

__all__ = [
    'BRANCHES',
    'POSITIONS',
    'AttentionSite',
    'Built',
    'Computed',
    'Edit',
    'Insertion',
    'Original',
    'PatchedModule',
    'Plan',
    'Refusal',
    'Site',
    'Swap',
    'Target',
    'WholeSite',
    'apply_plan',
    'bound_arguments',
    'check_choice',
    'check_model',
    'check_not_compact',
    'check_undoable',
    'disabled',
    'drop_unread_parameters',
    'edit_of',
    'first_tensor',
    'patched_class',
    'patched_modules',
    'plan_insertion',
    'plan_swap',
    'put_back',
    'trainable_parameters',
    'unpatch_model',
    'unread_parameters',
]
