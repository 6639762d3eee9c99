"""Attention cores as sites, and the edits that put another core in their place.

A swap keeps the projections, norms, rotary embeddings, windows and the layout around the core, and drops what only fed
the old core: keys and values that the new one does not read, position biases, masks of windows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import TraceError
from sem_timm.meta.layout import layout_of
from sem_timm.meta.vocabulary import Kind, names_of
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.bytecode import names_called, names_called_by
from sem_timm.surgery.cases import run_other_case
from sem_timm.surgery.graphs import Values, Verdict, ancestors
from sem_timm.surgery.placement import (
    Placement,
    Rehearsal,
    check_editable,
    check_methods,
    free_names,
    written,
)
from sem_timm.surgery.proof import prove_swap
from sem_timm.surgery.reading import Reader, Reading, bound_arguments
from sem_timm.surgery.rewrite import Edit, edit_of
from sem_timm.surgery.sites import AttentionSite, Refused, Swap
from sem_timm.surgery.structure import call_key
from sem_timm.surgery.swap.cores import Core, Extra, cores_of, judged_softmaxes
from sem_timm.surgery.swap.edit import SwappedGraphs, guards_for_unread, swapped, unread_arguments
from sem_timm.surgery.swap.grids import Grids
from sem_timm.surgery.swap.queries import check_sources, heads_of
from sem_timm.surgery.swap.rehearsal import rehearse_swap
from sem_timm.surgery.swap.rows import Rows
from sem_timm.surgery.swap.scale import check_scale
from sem_timm.surgery.swap.terms import loses_terms, mask_of
from sem_timm.surgery.swap.whole import check_order, check_stored, check_terms, place_whole
from sem_timm.surgery.trial import try_swap


class NoCore(Refused):
    """A module has no softmax in its own forward that could be a core."""


class Unread(Refused):
    """A module has a softmax, or may have one, and no core that can be read."""


def attention_modules(reader: Reader) -> list[str]:
    """Names of the modules that may hold an attention core in their own forward, in the order of ``named_modules``."""
    put_there = tuple(f'{name}.{child}.' for name, module in reader.modules.items() for child in _inserted(module))
    return [
        name
        for name, module in reader.modules.items()
        if name and name in reader.probe.calls and not f'{name}.'.startswith(put_there) and may_attend(module)
    ]


def _inserted(module: nn.Module) -> tuple[str, ...]:
    edit = edit_of(module)
    return () if edit is None else edit.inserted


def may_attend(module: nn.Module) -> bool:
    """Whether a module's own forward may compute attention, or did before it was patched."""
    if type(module).__module__.startswith('torch.nn.'):
        return isinstance(module, nn.MultiheadAttention)
    if edit_of(module, inherited=True) is not None or any(isinstance(child, nn.Softmax) for child in module.children()):
        return True
    mentioned, words = names_called(type(module)), names_of(Kind.SOFTMAX, Kind.ATTENTION)
    # Or it leaves that to an object, such as a processor, which is handed the module.
    kept = [type(module.__dict__[name]) for name in sorted(mentioned & module.__dict__.keys())]
    called = [cls for cls in kept if isinstance(vars(cls).get('__call__'), FunctionType)]
    return bool(mentioned & words) or any(names_called_by(cls, '__call__') & words for cls in called)


def other_case(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the swapped forward of a module for a call that decides otherwise than the one that was planned for."""
    return run_other_case(module, args, kwargs, Swapper)


class Swapper:
    """Places one attention operation in the attention modules of one probed model."""

    noun = 'attention modules'

    def __init__(self, reader: Reader, operation: Swap) -> None:
        self.reader = reader
        self.operation = operation
        self.candidates = attention_modules(reader)
        self._grids = Grids(reader, self.candidates)
        self._tables_of: dict[type, frozenset[str]] = {}
        self._tried: set[Hashable] = set()
        self._heads: dict[tuple[fx.Node, tuple[int, ...]], tuple[int, int]] = {}
        # The readings of each module in which cores were looked for, and what became of the softmaxes there.
        self.judged: dict[str, list[tuple[Reading, list[Verdict[Core]]]]] = {}

    def place(self, name: str) -> Placement:
        """Finds the cores of one module.

        Raises:
            Refused: If it has none that the operation can replace.
        """
        check_editable(self.reader, name)
        if not self.operation.replaces_module:
            return self._cores(name)
        if name and name not in self.candidates:  # a module that is read by itself was one in its model
            raise NoCore(self._no_core(name))
        placement = place_whole(self.reader, self.operation, name, other_case)
        self._check_whole(name)
        return placement

    def _check_whole(self, name: str) -> None:
        """Raises Refused if a module that is replaced as a whole does what the new one cannot know of."""
        module, call = self.reader.modules[name], self.reader.probe.calls[name]
        try:
            reading, cores = self._read(name)
            check_terms(cores, module, reading.values[False], self.operation)
        except Unread:  # talking heads, say
            form = self.reader.structures.describe(module), call_key(bound_arguments(module, call), shapes=True)
            check_stored(module, call)
            if form not in self._tried:
                check_order(module, call)
            self._tried.add(form)

    def prove(self, name: str, placement: Placement) -> None:
        """Compares the edited forward with the original in numbers; raises TraceError if they differ."""
        if placement.reading is not None and placement.swapped is not None:
            module, cores = self.reader.modules[name], placement.swapped.cores
            prove_swap(placement.reading, module, placement.edit, cores, self.operation.reads_keys)

    def unreadable(self) -> dict[str, str]:
        """None: what may attend and cannot be read is refused by name."""
        return {}

    def rehearse(self, placements: dict[str, Placement]) -> Rehearsal:
        """Applies placements to the weightless copy and runs it: shapes must stay, parameters may become unread."""
        return rehearse_swap(self.reader, placements, self.operation)

    def _read(self, name: str) -> tuple[Reading, list[Core]]:
        """The reading of a module in which its cores can be seen."""
        reasons: list[Exception] = []
        # First with own methods as single nodes, which is quicker and keeps them whole in the new forward.
        for inline_methods in (False, True):
            try:
                reading = self.reader.read_with(name, inline_methods=inline_methods)
            except TraceError as error:
                reasons.append(error)
                continue
            graph, module = reading.trace.graphs[False], self.reader.modules[name]
            verdicts = list(judged_softmaxes(graph, module, reading.values[False]))
            self.judged.setdefault(name, []).append((reading, verdicts))
            cores = cores_of(verdicts)
            # One of its own methods in front of the queries hides how their axes came about.
            hidden = any(node.target in reading.trace.methods for node in ancestors([core.query for core in cores]))
            if cores and not (hidden and not inline_methods):
                return reading, cores
            # That a softmax is none of a core says more than that the forward could not be traced.
            reasons = [verdict.cause for verdict in verdicts if verdict.cause is not None] or reasons
            if not reading.trace.methods:
                break
        if reasons:
            raise Unread(str(reasons[0])) from reasons[0]
        raise NoCore(self._no_core(name))

    def _no_core(self, name: str) -> str:
        inside = [other for other in self.candidates if other.startswith(f'{name}.')]
        hint = f'; {inside[0]} may have one' if inside else ''
        return f'its own forward has no attention core{hint}'

    def _cores(self, name: str) -> Placement:
        module = self.reader.modules[name]
        reading, cores = self._read(name)
        check_methods(module, reading.trace.graphs[False])
        attributes = free_names(module, self.operation.attribute, len(cores))
        values = reading.values[False]
        if _pools(reading):
            raise Refused('it pools its tokens into one; only one query is used')
        sites = tuple(self._site(name, attribute, core, values, reading) for core, attribute in zip(cores, attributes))
        # What is a core, and which rows of a packed weight are read, depends on shapes, which the trace does not.
        nodes = tuple((core.output, core.query, core.key, core.value) for core in cores)
        shapes = tuple(parameter.shape for parameter in module.parameters())
        of_sites = tuple((site.masked, site.shape[-1]) for site in sites)
        key = (self.operation, attributes, nodes, of_sites, shapes, self._tables(type(module)))
        edits = reading.trace.edits
        if key not in edits:
            edits[key] = self._edited(name, reading, cores, attributes)
        return Placement(sites, edits[key][0], reading, edits[key][1])

    def _site(self, name: str, attribute: str, core: Core, values: Values, reading: Reading) -> AttentionSite:
        module = self.reader.modules[name]
        query, key, value = values[core.query], values[core.key], values[core.value]
        if not query.is_floating_point():
            raise Refused(f'its queries are of {query.dtype}')
        mask = self.mask(core, module, values)
        if self.operation.reads_keys:
            check_scale(core.scale)
        check_sources(core, values, self.operation)
        found = core.query, tuple(query.shape)
        if found not in self._heads:
            self._heads[found] = heads_of(core, module, values)
        num_heads, head_axis = self._heads[found]
        given = tree_leaves(list(reading.trace.values.values()))
        tokens: Any = next((leaf for leaf in given if layout_of(leaf) is not None), None)
        # Prefix tokens are those of the tokens that come in, unless queries are of others, such as those of windows.
        layout = layout_of(tokens)
        as_tokens = layout is not None and tokens.ndim == 3 and tokens.shape[1] == query.shape[-2]
        prefix = layout.prefix if layout is not None and as_tokens else 0
        site = AttentionSite(
            name=name,
            class_name=type(module).__name__,
            attribute=attribute,
            shape=tuple(query.shape),
            key_shape=tuple(key.mT.shape if core.key_transposed else key.shape),
            value_shape=tuple(value.mT.shape if core.transposed else value.shape),
            dtype=query.dtype,
            num_heads=num_heads,
            head_axis=head_axis,
            num_prefix_tokens=prefix,
            grid_size=self._grids.find(name, reading.trace.values, query.shape[-2] - prefix),
            masked=mask is not None,
            loses_terms=loses_terms(core, values, mask),
        )
        given_mask = None if mask is None else values[mask.node]
        return replace(site, num_parameters=try_swap(self.operation, site, given_mask))

    def mask(self, core: Core, module: nn.Module, values: Values) -> Extra | None:
        """What of a core's extras the new core is handed, or raises Refused."""
        return mask_of(core, module, values, self.operation)

    def _edited(
        self, name: str, reading: Reading, cores: list[Core], attributes: tuple[str, ...]
    ) -> tuple[Edit, SwappedGraphs]:
        module, trace = self.reader.modules[name], reading.trace
        graphs: dict[bool, fx.Graph] = {}
        found: dict[bool, dict[str, Core]] = {}
        sliced: dict[str, Rows] = {}
        computed: list[str] = []
        for mode in (False, True):
            if mode and trace.graphs[True] is trace.graphs[False]:
                graphs[True], found[True] = graphs[False], found[False]
                continue
            if mode:
                cores = cores_of(judged_softmaxes(trace.graphs[True], module, reading.values[True]))
            if len(cores) != len(attributes):
                raise Refused('its forward attends differently in training and in eval mode')
            values = reading.values[mode]
            masks = [self.mask(core, module, values) for core in cores]
            found[mode] = {name: core.led_by(mask) for name, core, mask in zip(attributes, cores, masks)}
            graphs[mode], sliced, computed = swapped(
                trace.graphs[mode], found[mode], masks, self.operation, module, values
            )
        # Guards of what only the old core looked at go, unless the old core was told to do something else by it.
        guards = [*trace.guards, *guards_for_unread(reading, graphs)]
        unread = unread_arguments(trace.values, graphs) & self._tables(type(module))
        guards = [guard for guard in guards if guard.condition.split(' is ')[0] not in unread]
        guarded = replace(trace, guards=tuple(dict.fromkeys(guards)))
        edit = written(type(module), guarded, graphs, other_case, attributes, 'core', self.operation)
        return edit, SwappedGraphs(found, graphs, sliced, tuple(computed))

    def _tables(self, cls: type) -> frozenset[str]:
        """Arguments in which some module of a class gets a table, such as the mask of shifted windows.

        Where the new core reads none, it does not matter which modules of the class get one and which get None, so
        that resizing the model may change it.
        """
        if cls not in self._tables_of:
            # All modules of the class are asked, since a resized model may shift other windows than this one does.
            found = set()
            for name, call in self.reader.probe.calls.items():
                if type(self.reader.modules[name]) is cls:
                    values = bound_arguments(self.reader.modules[name], call)
                    found |= {n for n, v in values.items() if isinstance(v, Tensor) and layout_of(v) is None}
            self._tables_of[cls] = frozenset(found)
        return self._tables_of[cls]


def _pools(reading: Reading) -> bool:
    """Whether a module returns a matrix (B, C) of what has more axes, such as tokens (B, N, C)."""
    output = reading.values[False][next(iter(reversed(reading.trace.graphs[False].nodes)))]
    tensors = tensors_in(list(reading.trace.values.values()))
    return isinstance(output, Tensor) and bool(tensors) and output.ndim == 2 and tensors[0].ndim > 2
