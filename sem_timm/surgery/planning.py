"""From a model, an operation and a target to a plan."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sem_timm.errors import ModelError, RefusedError, TraceError
from sem_timm.surgery.blocks import find_blocks
from sem_timm.surgery.insert import Inserter, Placement, Refused
from sem_timm.surgery.plan import Insertion, Plan, Refusal, Site
from sem_timm.surgery.reading import Reader
from sem_timm.surgery.rewrite import Edit, patched_class
from sem_timm.surgery.select import Target, select
from sem_timm.surgery.skeleton import probe
from sem_timm.surgery.verify import verify


def plan_insertion(
    model: nn.Module,
    operation: Insertion,
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
) -> Plan:
    """Plans the insertion of new modules into ``model``, which is not touched.

    Args:
        model: Any module with residual blocks; timm's need no ``input_size``.
        operation: What to insert and where.
        target: Restricts the plan; by default all blocks.
        exclude: Modules to leave out, by the same rules.
        input_size: Shape (C, H, W) of one input.

    Raises:
        NoMatchError: If target or exclude, or an entry of one, selects nothing.
        RefusedError: If what was asked for by target can take no such module, or nothing in the model can.
        ModelError: If the model is wrapped, or its input size is not known.
        OptionError: If ``input_size`` does not fit the model.
    """
    check_model(model)
    wanted = None if target is None else select(model, target)
    unwanted = set() if exclude is None else {name for _, names in select(model, exclude, 'exclude') for name in names}
    with torch.random.fork_rng(devices=[]):
        reader = Reader(probe(model, input_size))
        blocks = [name for name in find_blocks(reader) if name not in unwanted]
        work = _Work(Inserter(reader, operation))
        if wanted is None:
            work.place_all(blocks)
        else:
            for entry, names in wanted:
                work.place_wanted(entry, [name for name in names if name not in unwanted], blocks)
        if not work.placements:
            raise RefusedError(_nothing(model, operation, work.refusals))
        _verify(reader, work.placements)
    order = [name for name in reader.modules if name in work.placements]
    sites = tuple(site for name in order for site in work.placements[name].sites)
    return Plan(
        operation=operation,
        model_name=type(model).__name__,
        input_size=reader.probe.input_size,
        sites=sites,
        refusals=tuple(Refusal(n, type(reader.modules[n]).__name__, why) for n, why in work.refusals.items()),
        edits={name: work.placements[name].edit for name in order},
        model=weakref.ref(model),
        classes=class_map(model),
    )


def class_map(model: nn.Module) -> dict[str, type]:
    """Class of every module by name: what must not change between a plan and its application."""
    return {name: type(module) for name, module in model.named_modules()}


@dataclass
class _Work:
    """Placements and refusals gathered for one plan."""

    inserter: Inserter
    placements: dict[str, Placement] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def place_all(self, names: list[str]) -> None:
        for name in names:
            if name not in self.placements and name not in self.refusals:
                try:
                    self.placements[name] = self.inserter.place(name)
                except Refused as refusal:
                    self.refusals[name] = str(refusal)

    def place_wanted(self, entry: str, names: list[str], blocks: list[str]) -> None:
        """Places one entry of a target: its blocks, or where it selects none the modules themselves."""
        chosen = [name for name in blocks if name in set(names)] or names
        self.place_all(chosen)
        if not any(name in self.placements for name in chosen):
            reasons = [f'{name}: {self.refusals[name]}' for name in chosen if name in self.refusals]
            more = f'\n  … and {len(reasons) - 5} more' if len(reasons) > 5 else ''
            raise RefusedError(
                f'target {entry} selects only modules that can take no {self.inserter.operation.attribute}:\n  '
                + ('\n  '.join(reasons[:5]) or 'all of them are excluded')
                + more
            )


def _verify(reader: Reader, placements: dict[str, Placement]) -> None:
    """Compares each distinct rewritten forward with the original, on the smallest block that uses it."""
    smallest: dict[Edit, tuple[int, str]] = {}
    for name, placement in placements.items():
        if placement.reading is not None:
            size = sum(torch.Size(site.shape).numel() for site in placement.sites)
            known = smallest.get(placement.edit)
            if known is None or size < known[0]:
                smallest[placement.edit] = (size, name)
    for edit, (_, name) in smallest.items():
        reading = placements[name].reading
        assert reading is not None
        modes = {False} if reading.trace.graphs[True] is reading.trace.graphs[False] else {True, False}
        for training in modes:
            try:
                with _on_cpu():
                    verify(reading, reader.modules[name], patched_class(edit), edit.inserted, training)
            except TraceError as error:
                raise RefusedError(f'{name}: {error}') from error


def _on_cpu() -> AbstractContextManager[object]:
    """Where tensors are made by default, wherever the caller has them made; free where that is so already."""
    return nullcontext() if torch.get_default_device().type == 'cpu' else torch.device('cpu')


def _nothing(model: nn.Module, operation: Insertion, refusals: dict[str, str]) -> str:
    reasons = [f'\n  {name}: {reason}' for name, reason in list(refusals.items())[:5]]
    found = f'{len(refusals)} blocks were found and refused:' if refusals else 'it has no blocks, as far as can be seen.'
    return f'nothing in {type(model).__name__} can take {operation}; {found}{"".join(reasons)}'


def check_model(model: Any) -> None:
    """Raises ModelError, with the call that unwraps it, for a model whose forward is not its own."""
    if not isinstance(model, nn.Module):
        raise ModelError(f'a torch.nn.Module is needed, not {type(model).__name__}.')
    names = {base.__name__ for base in type(model).__mro__}
    wrappers = {
        'DistributedDataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
        'DataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
        'FullyShardedDataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
        'FSDPModule': 'patch the model before fully_shard(model)',
        'OptimizedModule': 'patch the model inside, patch_model(model._orig_mod), and compile it again',
        'ScriptModule': 'patch the model before torch.jit.script or torch.jit.trace',
        'GraphModule': 'patch the model before it is traced by torch.fx',
    }
    for name, advice in wrappers.items():
        if name in names:
            raise ModelError(f'the model is wrapped in {name}; {advice}.')
    if getattr(model, '_compiled_call_impl', None) is not None:
        raise ModelError('the model was compiled in place; patch it before model.compile().')
