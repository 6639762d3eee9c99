"""Finds places in models and edits them; knows nothing of what is put there."""

from sem_timm.surgery.patch import PatchedModule, apply_plan, patched, unpatch_model
from sem_timm.surgery.plan import BRANCHES, POSITIONS, Insertion, Plan, Refusal, Site, check_choice
from sem_timm.surgery.planning import plan_insertion
from sem_timm.surgery.select import Target

__all__ = [
    'BRANCHES',
    'POSITIONS',
    'Insertion',
    'PatchedModule',
    'Plan',
    'Refusal',
    'Site',
    'Target',
    'apply_plan',
    'check_choice',
    'patched',
    'plan_insertion',
    'unpatch_model',
]
