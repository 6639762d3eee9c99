"""Finds places in models and edits them; knows nothing of what is put there."""

from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.disable import disabled
from sem_timm.surgery.factor import FactorPlace, Multiplied, factor_places
from sem_timm.surgery.freeze import check_not_compact, drop_unread_parameters, trainable_parameters, unread_parameters
from sem_timm.surgery.graphs import Values, Verdict, own_methods_called
from sem_timm.surgery.insert import Inserter
from sem_timm.surgery.patch import (
    Built,
    PatchedModule,
    apply_plan,
    check_undoable,
    patched_modules,
    unpatch_model,
    unpatch_modules,
)
from sem_timm.surgery.placement import Placement
from sem_timm.surgery.plan import Plan
from sem_timm.surgery.planning import check_model, plan_insertion, plan_swap
from sem_timm.surgery.reading import Reader, Reading, bound_arguments, reading_of
from sem_timm.surgery.residual import ResidualAdd, judged_sums, last_of_each_output
from sem_timm.surgery.rewrite import Edit, edit_of, patched_class, put_back
from sem_timm.surgery.sites import BRANCHES, POSITIONS, AttentionSite, Insertion, Refusal, Refused, Site, Swap
from sem_timm.surgery.source import statements
from sem_timm.surgery.statistics import noted_statistics
from sem_timm.surgery.swap import Core, NotACore, Swapper, heads_of, judged_softmaxes
from sem_timm.surgery.swap.original import Computed, Original
from sem_timm.surgery.swap.whole import WholeSite
from sem_timm.surgery.tracers import own_methods
from sem_timm.targets import Target

__all__ = [
    'BRANCHES',
    'POSITIONS',
    'AttentionSite',
    'Built',
    'Computed',
    'Core',
    'Edit',
    'FactorPlace',
    'Inserter',
    'Insertion',
    'Multiplied',
    'NotACore',
    'Original',
    'PatchedModule',
    'Placement',
    'Plan',
    'Reader',
    'Reading',
    'Refusal',
    'Refused',
    'ResidualAdd',
    'Site',
    'Swap',
    'Swapper',
    'Target',
    'Values',
    'Verdict',
    'WholeSite',
    'apply_plan',
    'bound_arguments',
    'check_model',
    'check_not_compact',
    'check_undoable',
    'disabled',
    'drop_unread_parameters',
    'edit_of',
    'factor_places',
    'heads_of',
    'judged_softmaxes',
    'judged_sums',
    'last_of_each_output',
    'noted_statistics',
    'own_methods',
    'own_methods_called',
    'patched_class',
    'patched_modules',
    'plan_insertion',
    'plan_swap',
    'put_back',
    'reading_of',
    'statements',
    'tensors_in',
    'trainable_parameters',
    'unpatch_model',
    'unpatch_modules',
    'unread_parameters',
]
