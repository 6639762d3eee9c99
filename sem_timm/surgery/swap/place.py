"""Attention cores as sites, and the edits that put another core in their place.

A swap keeps the projections, norms, rotary embeddings, windows and the layout around the core, and drops what only fed
the old core: keys and values that the new one does not read, position biases, masks of windows. A whole attention
module can be replaced as well, where it maps (B, N, C) to (B, N, C) by itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import TraceError
from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.graphs import ancestors
from sem_timm.surgery.layout import Layout, LayoutMode, layout_of, set_layout
from sem_timm.surgery.placement import Placement, Refused, check_editable, check_hashable, compiled, free_names
from sem_timm.surgery.plan import AttentionSite, Swap
from sem_timm.surgery.reading import Reader, Reading, bound_arguments
from sem_timm.surgery.rewrite import Edit, edit_of
from sem_timm.surgery.source import graph_source
from sem_timm.surgery.swap.cores import Core, find_cores
from sem_timm.surgery.swap.edit import Swapping, calling, guards_for_unread, swapped, unread_arguments
from sem_timm.surgery.swap.packed import Rows
from sem_timm.surgery.swap.queries import check_sources, grid_of, heads_of, passes_mask
from sem_timm.surgery.trace import Trace, forward_signature


class NoCore(Refused):
    """A module has no softmax in its own forward that could be a core."""


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


_ATTENTION_NAMES = {'softmax', 'scaled_dot_product_attention'}


def may_attend(module: nn.Module) -> bool:
    """Whether a module's own forward may compute attention, or did before it was patched."""
    if type(module).__module__.startswith('torch.nn.'):
        return False
    if edit_of(module, inherited=True) is not None or any(isinstance(child, nn.Softmax) for child in module.children()):
        return True
    return bool(names_called(type(module)) & _ATTENTION_NAMES)


class Swapper:
    """Places one attention operation in modules of one probed model."""

    def __init__(self, reader: Reader, operation: Swap) -> None:
        self.reader = reader
        self.operation = operation
        check_hashable(operation)
        self._attending = attention_modules(reader)
        self._tables_of: dict[type, frozenset[str]] = {}
        self._heads: dict[tuple[fx.Node, tuple[int, ...]], tuple[int, int]] = {}

    def place(self, name: str) -> Placement:
        """Finds the cores of one module.

        Raises:
            Refused: If it has none that the operation can replace.
        """
        check_editable(self.reader, name)
        return self._whole(name) if self.operation.replaces_module else self._cores(name)

    def _read(self, name: str) -> tuple[Reading, list[Core]]:
        """The reading of a module in which its cores can be seen."""
        reasons: list[str] = []
        for inline_methods in (False, True):
            try:
                reading = self.reader.read_with(name, inline_methods=inline_methods)
            except TraceError as error:
                reasons.append(str(error))
                continue
            cores, others = find_cores(reading.trace.graphs[False], self.reader.modules[name], reading.values[False])
            # One of its own methods in front of the queries hides how their axes came about.
            hidden = any(node.target in reading.trace.methods for node in ancestors([core.query for core in cores]))
            if cores and not (hidden and not inline_methods):
                return reading, cores
            reasons = others or reasons
            if not reading.trace.methods:
                break
        if reasons:
            raise Refused(reasons[0])
        raise NoCore(self._no_core(name))

    def _no_core(self, name: str) -> str:
        inside = [other for other in self._attending if other.startswith(f'{name}.')]
        hint = f'; {inside[0]} may have one' if inside else ''
        return f'its own forward has no attention core{hint}'

    def _cores(self, name: str) -> Placement:
        module = self.reader.modules[name]
        reading, cores = self._read(name)
        attributes = free_names(module, self.operation.attribute, len(cores))
        values = reading.values[False]
        if self._pools(name, reading):
            raise Refused('it pools its tokens into one; only one query is used')
        sites = tuple(self._site(name, attribute, core, values, reading) for core, attribute in zip(cores, attributes))
        # Which rows of a packed weight are read depends on its shape, which the trace does not.
        shapes = tuple(parameter.shape for parameter in module.parameters())
        key = (self.operation, attributes, tuple(site.masked for site in sites), shapes, self._tables(type(module)))
        edits = reading.trace.edits
        if key not in edits:
            edits[key] = self._edited(name, reading, attributes, [site.masked for site in sites])
        edit, swapping = edits[key]
        return Placement(sites, edit, reading, swapping)

    def _pools(self, name: str, reading: Reading) -> bool:
        output = reading.values[False][next(iter(reversed(reading.trace.graphs[False].nodes)))]
        tensors = [leaf for leaf in tree_leaves(list(reading.trace.values.values())) if isinstance(leaf, Tensor)]
        return isinstance(output, Tensor) and bool(tensors) and output.ndim == 2 and tensors[0].ndim > 2

    def _site(
        self, name: str, attribute: str, core: Core, values: dict[fx.Node, Any], reading: Reading
    ) -> AttentionSite:
        module = self.reader.modules[name]
        query, key, value = values[core.query], values[core.key], values[core.value]
        if not query.is_floating_point():
            raise Refused(f'its queries are of {query.dtype}')
        if core.is_causal:
            raise Refused('its attention is causal: a token sees only those before it')
        check_sources(core, values)
        found = core.query, tuple(query.shape)
        if found not in self._heads:
            self._heads[found] = heads_of(core, module, values)
        num_heads, head_axis = self._heads[found]
        given = tree_leaves(list(reading.trace.values.values()))
        tokens: Any = next((leaf for leaf in given if layout_of(leaf) is not None), None)
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
            grid_size=grid_of(reading, query.shape[-2] - prefix),
            masked=passes_mask(core, values, self.operation),
        )
        return replace(site, num_parameters=_rehearsed(self.operation, site))

    def _edited(
        self, name: str, reading: Reading, attributes: tuple[str, ...], masked: list[bool]
    ) -> tuple[Edit, Swapping]:
        module, trace = self.reader.modules[name], reading.trace
        graphs: dict[bool, fx.Graph] = {}
        found: dict[bool, dict[str, Core]] = {}
        sliced: dict[str, Rows] = {}
        for mode in (False, True):
            if mode and trace.graphs[True] is trace.graphs[False]:
                graphs[True], found[True] = graphs[False], found[False]
                continue
            cores, _ = find_cores(trace.graphs[mode], module, reading.values[mode])
            if len(cores) != len(attributes):
                raise Refused('its forward attends differently in training and in eval mode')
            found[mode] = dict(zip(attributes, cores))
            graphs[mode], sliced = swapped(
                trace.graphs[mode], found[mode], masked, self.operation.reads_keys, module, reading.values[mode]
            )
        guards = [*trace.guards, *guards_for_unread(reading, graphs)]
        unread = unread_arguments(trace.values, graphs) & self._tables(type(module))
        guards = [guard for guard in guards if guard.condition.split(' is ')[0] not in unread]
        try:
            source, bindings = graph_source(type(module), replace(trace, guards=tuple(dict.fromkeys(guards))), graphs)
        except SyntaxError as error:
            raise Refused(f'its forward cannot be written as code: {error}') from error
        edit = Edit(type(module), source, bindings, attributes, 'core', self.operation)
        return compiled(edit), Swapping(found, graphs, sliced)

    def _tables(self, cls: type) -> frozenset[str]:
        """Arguments in which some module of a class gets a table, such as the mask of shifted windows.

        Where the new core reads none, it does not matter which modules of the class get one and which get None, so
        that resizing the model may change it.
        """
        if cls not in self._tables_of:
            found = set()
            for name, call in self.reader.probe.calls.items():
                if type(self.reader.modules[name]) is cls:
                    values = bound_arguments(self.reader.modules[name], call)
                    found |= {n for n, v in values.items() if isinstance(v, Tensor) and layout_of(v) is None}
            self._tables_of[cls] = frozenset(found)
        return self._tables_of[cls]

    def _whole(self, name: str) -> Placement:
        """Replaces all that an attention module computes by one new child."""
        module, call = self.reader.modules[name], self.reader.probe.calls[name]
        if name not in self._attending:
            raise NoCore(self._no_core(name))
        if self.reader.holds_residual(name):
            raise Refused('it is a block, of which the attention is only a part')
        values = bound_arguments(module, call)
        first, *others = values.items()
        layout = layout_of(first[1])
        if layout is None or first[1].ndim != 3 or layout.channel != 2 or layout.batch != 0:
            raise Refused('its input is not (B, N, C)')
        if not isinstance(call.output, Tensor) or call.output.shape != first[1].shape:
            raise Refused('its output has not the shape (B, N, C) of its input')
        data = [key for key, value in others if any(layout_of(leaf) is not None for leaf in tree_leaves(value))]
        if data:
            raise Refused(f'it is also given {data[0]}, which depends on the data')
        (attribute,) = free_names(module, self.operation.attribute)
        heads = getattr(module, 'num_heads', 1)
        shape = tuple(first[1].shape)
        num_heads = heads if isinstance(heads, int) and heads > 0 and shape[2] % heads == 0 else 1
        masked = 'attn_mask' in values
        site = AttentionSite(
            name, type(module).__name__, attribute, shape, shape, shape, first[1].dtype, num_heads, masked=masked
        )
        site = replace(site, num_parameters=_rehearsed(self.operation, site))
        graph = calling(attribute, list(values), masked)
        trace = Trace(forward_signature(type(module)), values, {True: graph, False: graph}, (), frozenset())
        reading = Reading(trace, {}, {})
        guards = tuple(guards_for_unread(reading, trace.graphs))
        source, bindings = graph_source(type(module), replace(trace, guards=guards), trace.graphs)
        edit = compiled(Edit(type(module), source, bindings, (attribute,), 'core', self.operation))
        return Placement((site,), edit, None, Swapping({}, trace.graphs, {}))


def _rehearsed(operation: Any, site: AttentionSite) -> int:
    return _rehearse(operation, replace(site, name='', class_name='', attribute=''))


@lru_cache(maxsize=4096)
def _rehearse(operation: Any, site: AttentionSite) -> int:
    """Builds and runs the new core once on meta tensors; returns its number of parameters."""
    device = torch.device('meta')
    shapes = [site.shape, site.key_shape, site.value_shape][: 3 if operation.reads_keys else 1]
    try:
        new = operation.build(site, device, site.dtype).eval()
        inputs = [set_layout(torch.empty(shape, dtype=site.dtype, device=device), Layout()) for shape in shapes]
        with torch.no_grad(), LayoutMode():
            out = new(*inputs)
    except Exception as error:
        raise Refused(f'{operation} does not work on queries {site.shape}: {type(error).__name__}: {error}') from error
    expected = (*site.shape[:-1], site.value_shape[-1])
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        raise Refused(f'{operation} returns {tuple(getattr(out, "shape", ()))} where {expected} is needed')
    return sum(parameter.numel() for parameter in new.parameters())
