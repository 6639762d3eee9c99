"""Applying a plan, all or nothing, and undoing it.

What was done is kept where it was done: a patched module's class knows its base class, the children that were added
and the operation. So a copy, an unpickled model and a wrapper around patched blocks can be undone as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from sem_timm.compat import forget_compiled
from sem_timm.errors import ModelError, PlanError, SwapWarning
from sem_timm.meta.skeleton import dtype_of
from sem_timm.random_state import preserved_random_state
from sem_timm.surgery.freeze import check_not_compact, freeze, unfreeze
from sem_timm.surgery.plan import Plan
from sem_timm.surgery.planning import check_model, structure_of
from sem_timm.surgery.rewrite import Note, edit_of, note_of, put_back, put_in
from sem_timm.surgery.sites import AttentionSite, Operation, Site
from sem_timm.surgery.statistics import forget_statistics, note_statistics


@dataclass(frozen=True)
class PatchedModule:
    """A module that was operated on.

    Attributes:
        name: Its name in the model.
        class_name: Its own class, which undoing gives back.
        inserted: Names of the children it got.
        position: Where they act: 'residual', 'output' or 'core'.
        operation: The configuration they were made from.
        sites: The sites of the plan in this module.
        input_size: Shape (C, H, W) of the plan's probe.
        number: Which patch of the model it belongs to, counted from 0.
    """

    name: str
    class_name: str
    inserted: tuple[str, ...]
    position: str
    operation: Operation
    sites: tuple[Site | AttentionSite, ...] = field(default=(), repr=False)
    input_size: tuple[int, ...] = field(default=(), repr=False)
    number: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Built:
    """A new child that is about to be put into a module.

    Attributes:
        site: Where it goes.
        module: The module of the model that gets it.
        new: The new child.
    """

    site: Site | AttentionSite
    module: nn.Module
    new: nn.Module


def apply_plan(model: nn.Module, plan: Plan, prepare: Callable[[list[Built]], None] | None = None) -> nn.Module:
    """Applies ``plan`` to ``model`` in place, all of it or nothing.

    Args:
        model: The model.
        plan: The plan.
        prepare: Called with all new children when they are built and the model is not touched yet, such as to give
            them initial values by what the model computes. If it fails, nothing was done.

    Returns:
        The model.

    Raises:
        PlanError: If the plan was made for another model, or this one has changed since.
    """
    check_model(model)
    _check_fit(model, plan)
    modules = {name: model.get_submodule(name) for name in plan.edits}
    try:
        with preserved_random_state(after_success=False):
            built = [Built(s, modules[s.name], _built(plan, s, modules[s.name], model)) for s in plan]
            if prepare is not None:
                prepare(built)
            if plan.swaps_attention:  # here, where a warning that is made an error changes nothing
                warnings.warn(_what_changes(plan), SwapWarning, stacklevel=3)
            for part in built:
                part.module.add_module(part.site.attribute, part.new)
            number = 1 + max((earlier.number for earlier in patched_modules(model)), default=-1)
            for name, edit in plan.edits.items():
                sites = tuple(site for site in plan if site.name == name)
                put_in(modules[name], edit, Note(number, plan.input_size, sites, plan.layouts.get(name, {})))
    except BaseException:
        for name, edit in plan.edits.items():
            put_back(modules[name], edit)
        raise
    freeze(model, plan.unread, plan.computed)
    note_statistics(model)
    forget_compiled()
    return model


def _what_changes(plan: Plan) -> str:
    took_place = f'{plan.model_name}: {plan.operation} took the place of self-attention, which'
    back = 'unpatch_model(model) gives the old one back.'
    operation: Any = plan.operation
    if not operation.fidelity:
        return f'{took_place} is not an identity. The model gives other outputs than before and needs training; {back}'
    if not plan.needs_training:
        return f'{took_place} it is close to, without training. {operation.fidelity} Measure your model; {back}'
    return (
        f'{took_place} it is close to, but for the position biases or masks of windows that went with the old one, at '
        f'{len(plan.losing_terms)} of {len(plan)} sites. The model gives other outputs than before and needs training; '
        f'{back}'
    )


def _built(plan: Plan, site: Any, block: nn.Module, model: nn.Module) -> nn.Module:
    """The new module with the device and mode of its block and the type of the tensor it is for."""
    tensors = chain(block.parameters(), block.buffers(), model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors if tensor.is_floating_point()), torch.device('cpu'))
    now = dtype_of(model)
    dtype = site.dtype if now == plan.dtype else now  # the model may have been cast since
    with torch.inference_mode(False):  # parameters made in that mode could never be trained
        return plan.operation.build(site, device, dtype).train(block.training)


def _check_fit(model: nn.Module, plan: Plan) -> None:
    again = 'Make a plan for it: patch_model(model, plan_model(model, ...)).'
    if plan.model() is not model:
        raise PlanError(
            f'this plan was made for another {plan.model_name}, not for this {type(model).__name__}. {again}'
        )
    before, now = plan.structure, structure_of(model)
    changed = [name for name in {**before, **now} if now.get(name) != before.get(name)]
    changed += [
        f'{s.name}.{s.attribute}' for s in plan if not changed and hasattr(model.get_submodule(s.name), s.attribute)
    ]
    if changed:
        raise PlanError(f'the model has changed since the plan was made, at {", ".join(changed[:3])}. {again}')


def patched_modules(model: nn.Module) -> tuple[PatchedModule, ...]:
    """Tells what was done to a model, and where.

    Args:
        model: Any model, also one that is wrapped.

    Returns:
        The modules that were operated on, in the order of ``named_modules``; empty if none was.
    """
    found = []
    for name, module in model.named_modules():
        edit = edit_of(module)
        if edit is not None:
            note = note_of(module)
            part = (name, edit.base.__name__, edit.inserted, edit.position, edit.operation)
            found.append(PatchedModule(*part, note.sites, note.input_size, note.number))
    return tuple(found)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes every patch of a model in place: classes and children are what they were before.

    Weights of the base that were trained meanwhile stay trained.

    Args:
        model: The patched model.

    Returns:
        The model.

    Raises:
        ModelError: If nothing in the model is patched, something wraps it, or its unread parameters were dropped.
    """
    check_model(model)
    if not any(edit_of(module, inherited=True) for module in model.modules()):
        raise ModelError(f'{type(model).__name__} is not patched; there is nothing to undo.')
    check_undoable(model)
    unfreeze(model)
    forget_statistics(model)
    for module in list(model.modules()):
        while (edit := edit_of(module)) is not None:
            put_back(module, edit)
    forget_compiled()
    return model


def unpatch_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Undoes the last patch of some modules of a model in place; where no patch is left, nothing is left of any.

    Args:
        model: The model, which `check_model` has seen.
        names: Names of patched modules.
    """
    for name in names:
        module = model.get_submodule(name)
        edit = edit_of(module)
        assert edit is not None
        put_back(module, edit)
    if not any(edit_of(module, inherited=True) for module in model.modules()):
        unfreeze(model)
        forget_statistics(model)
    forget_compiled()


def check_undoable(model: nn.Module) -> None:
    """Raises ModelError if a module of the model no longer is what the patch made of it."""
    check_not_compact(model)
    for name, module in model.named_modules():
        edit = edit_of(module, inherited=True)
        if edit is not None and edit is not edit_of(module):
            raise ModelError(
                f'{name} got another class since it was patched, {type(module).__name__}; undo that first.'
            )
        missing = [] if edit is None else [child for child in edit.inserted if child not in module._modules]
        if missing:
            raise ModelError(f'{name}.{missing[0]} was put there by the patch and is gone; nothing was undone.')
