"""From a model, an operation and a target to a plan."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from sem_timm.errors import ModelError, OptionError, RefusedError, TraceError
from sem_timm.meta.skeleton import dtype_of
from sem_timm.surgery.cases import has_cases, layouts_of_arguments
from sem_timm.surgery.insert import Inserter
from sem_timm.surgery.placement import Placement, Placer
from sem_timm.surgery.plan import Plan
from sem_timm.surgery.reading import Reader, reading_of
from sem_timm.surgery.rewrite import DISABLED
from sem_timm.surgery.sites import Insertion, Refusal, Refused, Swap
from sem_timm.surgery.swap import NoCore, Swapper, may_attend
from sem_timm.targets import Target, select


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
    return _planned(model, operation, Inserter, target, exclude, input_size)


def plan_swap(
    model: nn.Module,
    operation: Swap,
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
) -> Plan:
    """Plans another attention in place of the self-attention of ``model``, which is not touched.

    Args:
        model: Any module with self-attention; timm's need no ``input_size``.
        operation: What takes the place of the attention cores, or modules.
        target: Restricts the plan; by default all attention modules.
        exclude: Modules to leave out, by the same rules.
        input_size: Shape (C, H, W) of one input.

    Raises:
        SemTimmError: As `plan_insertion`.
    """
    check_model(model)
    if target is None and not any(map(may_attend, model.modules())):  # most convolutional networks, without a probe
        raise RefusedError(_nothing(model, operation, Swapper.noun, {}, False))
    return _planned(model, operation, Swapper, target, exclude, input_size)


def _planned(
    model: nn.Module,
    operation: Any,
    placer_of: Callable[[Reader, Any], Placer],
    target: Target | None,
    exclude: Target | None,
    input_size: tuple[int, ...] | None,
) -> Plan:
    try:
        hash(operation)  # plans and edits are looked up by it
    except TypeError as error:
        raise OptionError(f'{operation}: {error}; options of an operation are hashable, such as tuples.') from error
    wanted = None if target is None else select(model, target)
    unwanted = _excluded(model, exclude)
    with reading_of(model, input_size) as reader:
        placer = placer_of(reader, operation)
        found = [name for name in placer.candidates if name not in unwanted]
        work = _Work(placer)
        for entry, names in wanted or [('', found)]:
            kept = [name for name in names if name not in unwanted]
            work.place([name for name in found if name in set(kept)] or kept, entry)
        work.prove()
        work.check(operation)
        if wanted is None:
            failures = placer.unreadable().items()
            work.refusals.update((name, reason) for name, reason in failures if name not in unwanted)
        if not work.placements:
            nothing = _nothing(model, operation, placer.noun, work.refusals, bool(unwanted))
            raise RefusedError(nothing + ('' if work.refusals or unwanted else _example(reader, placer)))
        order = {name: work.placements[name] for name in reader.modules if name in work.placements}
        after = placer.rehearse(order)
    return Plan(
        operation=operation,
        model_name=type(model).__name__,
        input_size=reader.probe.input_size,
        dtype=dtype_of(model),
        sites=tuple(site for placement in order.values() for site in placement.sites),
        refusals=tuple(Refusal(n, type(reader.modules[n]).__name__, why) for n, why in work.refusals.items()),
        edits={name: placement.edit for name, placement in order.items()},
        model=weakref.ref(model),
        structure=structure_of(model),
        unread=tuple(after.unread),
        sliced=after.sliced,
        computed=tuple(after.computed),
        originals=after.originals,
        layouts={n: layouts_of_arguments(reader, n) for n, placed in order.items() if has_cases(placed.edit)},
    )


def structure_of(model: nn.Module) -> dict[str, Hashable]:
    """Class and shapes of every module by name: what must not change between a plan and its application."""
    return {
        name: (
            type(module),
            'forward' in module.__dict__,
            *((key, None if p is None else p.shape) for key, p in module._parameters.items()),
        )
        for name, module in model.named_modules()
    }


def _excluded(model: nn.Module, exclude: Target | None) -> set[str]:
    """The modules that an exclude selects, and all inside them."""
    chosen = [] if exclude is None else [name for _, names in select(model, exclude, 'exclude') for name in names]
    inside = tuple(name + '.' for name in chosen)
    return {name for name, _ in model.named_modules() if name in chosen or (inside and name.startswith(inside))}


_DIGITS = re.compile(r'\b\d+\b')


@dataclass
class _Work:
    """Placements and refusals gathered for one plan, and what each entry of the target came to."""

    placer: Placer
    placements: dict[str, Placement] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    entries: dict[str, list[str]] = field(default_factory=dict)

    def place(self, names: list[str], entry: str = '') -> None:
        """Places what one entry of a target selects; no entry stands for all blocks."""
        found = self.entries.setdefault(entry, [])
        for name in names:
            try:
                placement = self.placer.place(name)
            except NoCore as refusal:
                if entry:  # asked for by name
                    self.refusals[name] = str(refusal)
                    found.append(name)
            except Refused as refusal:
                self.refusals[name] = str(refusal)
                found.append(name)
            else:
                # A sequence of modules hands the site on to its last one.
                self.placements[placement.sites[0].name] = placement
                found.append(placement.sites[0].name)

    def prove(self) -> None:
        """Compares each distinct rewritten forward with the original, on the smallest module that uses it."""
        forms: dict[Hashable, list[str]] = {}
        for name, placement in self.placements.items():
            # Code that differs in numbers alone was derived alike; that its shapes fit is seen on the meta device.
            trace = None if placement.reading is None else id(placement.reading.trace.graphs)
            forms.setdefault((placement.edit.base, _DIGITS.sub('#', placement.edit.source), trace), []).append(name)
        for names in forms.values():
            # Arithmetic on the largest stage of a network would cost seconds and show no more.
            smallest = min(names, key=lambda name: sum(prod(site.shape) for site in self.placements[name].sites))
            try:
                self.placer.prove(smallest, self.placements[smallest])
            except TraceError as error:
                for name in names:
                    del self.placements[name]
                    self.refusals[name] = str(error)

    def check(self, operation: Any) -> None:
        """Raises RefusedError if all that an entry of the target selects is refused."""
        for entry, names in self.entries.items():
            if not entry or any(name in self.placements for name in names):
                continue
            reasons = [f'{name}: {self.refusals[name]}' for name in names]
            more = f'\n  … and {len(reasons) - 5} more' if len(reasons) > 5 else ''
            raise RefusedError(
                f'target {entry} selects only modules that can take no {operation}:\n  '
                + ('\n  '.join(reasons[:5]) or 'all of them are excluded')
                + more
            )


def _nothing(model: nn.Module, operation: Any, noun: str, refusals: dict[str, str], excluded: bool) -> str:
    reasons = [f'\n  {name}: {reason}' for name, reason in list(refusals.items())[:5]]
    found = f'exclude leaves no {noun}; exclude less.' if excluded else f'it has no {noun}, as far as can be seen.'
    found = f'{len(refusals)} {noun} were found and refused:' if refusals else found
    return f'nothing in {type(model).__name__} can take {operation}; {found}{"".join(reasons)}'


def _example(reader: Reader, placer: Placer) -> str:
    """What to type for a network without blocks of its own: the largest outer module that takes the operation."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in reader.modules.items() if name}
    for name in sorted(sizes, key=lambda name: (name.count('.'), -sizes[name])):
        call = reader.probe.calls.get(name)
        if call is None or not isinstance(call.output, Tensor):  # of several results nobody may read the first
            continue
        try:
            placer.place(name)
        except (Refused, TraceError):
            continue
        return f"\n  target= takes other modules by name, such as target='{name}'."
    return ''


_ADVICE = {
    'DistributedDataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
    'DataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
    'FullyShardedDataParallel': 'patch the model inside, patch_model(model.module), before wrapping it',
    'FSDPModule': 'patch the model before fully_shard(model)',
    'OptimizedModule': 'patch the model inside, patch_model(model._orig_mod), and compile it again',
    'ScriptModule': 'patch the model before torch.jit.script or torch.jit.trace',
    'GraphModule': 'patch the model before it is traced by torch.fx',
}


def check_model(model: Any) -> None:
    """Raises ModelError, with the call that unwraps it, for a model that is wrapped, or a part of which is."""
    if not isinstance(model, nn.Module):
        raise ModelError(f'a torch.nn.Module is needed, not {type(model).__name__}.')
    modules = dict(model.named_modules())
    first_of = {type(module): name for name, module in reversed(modules.items())}
    for cls, name in first_of.items():
        wrapper = next((base.__name__ for base in cls.__mro__ if base.__name__ in _ADVICE), None)
        if wrapper is not None:
            raise ModelError(f'{name or "the model"} is wrapped in {wrapper}; {_ADVICE[wrapper]}.')
    for name, module in modules.items():
        if getattr(module, '_compiled_call_impl', None) is not None:
            raise ModelError(f'{name or "the model"} was compiled in place; patch the model before compile().')
        if module.__dict__.get(DISABLED) is not None:
            raise ModelError(f'{name or "the model"} is switched off by disabled(model); leave its with block first.')
