"""Attention cores as sites, and the edits that put another core in their place.

A swap keeps the projections, norms, rotary embeddings, windows and the layout around the core, and drops what only fed
the old core: keys and values that the new one does not read, position biases, masks of windows. A whole attention
module can be replaced as well, where it maps (B, N, C) to (B, N, C) by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import OptionError, TraceError
from sem_timm.surgery.attention import Core, find_cores
from sem_timm.surgery.axes import changes_along_axes
from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.evaluate import ancestors
from sem_timm.surgery.insert import Placement, Refused
from sem_timm.surgery.layout import Layout, LayoutMode, layout_of, set_layout
from sem_timm.surgery.packed import Rows, slice_packed
from sem_timm.surgery.plan import AttentionSite, Swap
from sem_timm.surgery.prune import prune
from sem_timm.surgery.reading import Reader, Reading, bound_arguments
from sem_timm.surgery.rewrite import Edit, edit_of, patched_class
from sem_timm.surgery.source import graph_source
from sem_timm.surgery.trace import Guard, Trace, forward_signature


class NoCore(Refused):
    """A module has no softmax in its own forward that could be a core."""


@dataclass(frozen=True)
class Swapping:
    """How one reading was edited: what the check in numbers and the search for unread parameters start from.

    Attributes:
        cores: The cores that were replaced, by the names of the new children, for either mode.
        graphs: The edited graphs.
        sliced: Names of packed weights with the first row read, the one behind the last, and the number of rows.
    """

    cores: dict[bool, dict[str, Core]]
    graphs: dict[bool, fx.Graph]
    sliced: dict[str, Rows]


def attention_modules(reader: Reader) -> list[str]:
    """Names of the modules that may hold an attention core in their own forward, in the order of ``named_modules``."""
    return [name for name in reader.modules if name and name in reader.probe.calls and _may_attend(reader, name)]


_ATTENTION_NAMES = {'softmax', 'scaled_dot_product_attention'}


def _may_attend(reader: Reader, name: str) -> bool:
    module = reader.modules[name]
    if type(module).__module__.startswith('torch.nn.'):
        return False
    softmaxes = any(isinstance(child, nn.Softmax) for child in module.children())
    return (
        edit_of(module, inherited=True) is not None or softmaxes or bool(names_called(type(module)) & _ATTENTION_NAMES)
    )


class Swapper:
    """Places one attention operation in modules of one probed model."""

    def __init__(self, reader: Reader, operation: Swap) -> None:
        self.reader = reader
        self.operation = operation
        try:
            hash(operation)
        except TypeError as error:
            raise OptionError(f'{operation}: {error}; options of an operation are hashable, such as tuples.') from error

    def place(self, name: str) -> Placement:
        """Finds the cores of one module.

        Raises:
            Refused: If it has none that the operation can replace.
        """
        self._check(name)
        return self._whole(name) if self.operation.replaces_module else self._cores(name)

    def _check(self, name: str) -> None:
        module, count = self.reader.modules[name], self.reader.probe.counts.get(name, 0)
        edit = edit_of(module)
        if edit is not None:
            raise Refused(f'it is already patched ({edit.operation}); unpatch_model(model) first')
        if count == 0:
            raise Refused("the model's forward does not call it")
        if count > 1:
            raise Refused(f"the model's forward calls it {count} times; one new core cannot serve several calls")
        if not isinstance(inspect.getattr_static(type(module), 'forward'), FunctionType):
            raise Refused('its forward is not a plain function')
        if 'forward' in module.__dict__:
            raise Refused('its forward was replaced on the instance, which hides that of its class')

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
        inside = [other for other in attention_modules(self.reader) if other.startswith(f'{name}.')]
        hint = f'; {inside[0]} may have one' if inside else ''
        return f'its own forward has no attention core{hint}'

    def _cores(self, name: str) -> Placement:
        module = self.reader.modules[name]
        reading, cores = self._read(name)
        attributes = self._attributes(module, len(cores))
        values = reading.values[False]
        if self._pools(name, reading):
            raise Refused('it pools its tokens into one; only one query is used')
        sites = tuple(self._site(name, attribute, core, values, reading) for core, attribute in zip(cores, attributes))
        key = (self.operation, attributes, tuple(site.masked for site in sites))
        edits = reading.trace.edits
        if key not in edits:
            edits[key] = self._edited(name, reading, attributes, [site.masked for site in sites])
        edit, swapping = edits[key]
        return Placement(sites, edit, reading, swapping)

    def _pools(self, name: str, reading: Reading) -> bool:
        output = reading.values[False][next(iter(reversed(reading.trace.graphs[False].nodes)))]
        tensors = [leaf for leaf in tree_leaves(list(reading.trace.values.values())) if isinstance(leaf, Tensor)]
        return isinstance(output, Tensor) and bool(tensors) and output.ndim == 2 and tensors[0].ndim > 2

    def _attributes(self, module: nn.Module, count: int) -> tuple[str, ...]:
        base = self.operation.attribute
        names = [base] if count == 1 else [f'{base}{number}' for number in range(1, count + 1)]
        return tuple(_free_name(module, name) for name in names)

    def _site(
        self, name: str, attribute: str, core: Core, values: dict[fx.Node, Any], reading: Reading
    ) -> AttentionSite:
        module = self.reader.modules[name]
        query, key, value = values[core.query], values[core.key], values[core.value]
        if core.is_causal:
            raise Refused('its attention is causal: a token sees only those before it')
        _check_sources(core, values)
        num_heads, head_axis = _heads(core, module, values)
        key_shape, value_shape = list(key.shape), list(value.shape)
        if core.key_transposed:
            key_shape[-2:] = reversed(key_shape[-2:])
        if core.transposed:
            value_shape[-2:] = reversed(value_shape[-2:])
        masked = _passes_mask(core, values, self.operation)
        tokens = next((leaf for leaf in tree_leaves(list(reading.trace.values.values())) if layout_of(leaf)), None)
        layout = layout_of(tokens)
        prefix = layout.prefix if layout and tokens is not None and tokens.ndim == 3 else 0
        site = AttentionSite(
            name=name,
            class_name=type(module).__name__,
            attribute=attribute,
            shape=tuple(query.shape),
            key_shape=tuple(key_shape),
            value_shape=tuple(value_shape),
            dtype=query.dtype,
            num_heads=num_heads,
            head_axis=head_axis,
            num_prefix_tokens=prefix if query.shape[-2] == (tokens.shape[1] if tokens is not None else 0) else 0,
            grid_size=_grid(reading, query.shape[-2] - prefix),
            masked=masked,
        )
        if not query.is_floating_point():
            raise Refused(f'its queries are of {query.dtype}')
        operation: Any = self.operation
        return replace(site, num_parameters=_rehearse(operation, replace(site, name='', class_name='', attribute='')))

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
            graphs[mode], sliced = _swapped(
                trace.graphs[mode], found[mode], masked, self.operation.reads_keys, module, reading.values[mode]
            )
        guards = (*trace.guards, *_unread_constants(reading, graphs))
        try:
            source, bindings = graph_source(type(module), replace(trace, guards=tuple(dict.fromkeys(guards))), graphs)
        except SyntaxError as error:
            raise Refused(f'its forward cannot be written as code: {error}') from error
        edit = Edit(type(module), source, bindings, attributes, 'core', self.operation)
        return _compiled(edit), Swapping(found, graphs, sliced)

    def _whole(self, name: str) -> Placement:
        """Replaces all that an attention module computes by one new child."""
        module, call = self.reader.modules[name], self.reader.probe.calls[name]
        if name not in attention_modules(self.reader):
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
        attribute = _free_name(module, self.operation.attribute)
        heads = getattr(module, 'num_heads', 1)
        shape = tuple(first[1].shape)
        num_heads = heads if isinstance(heads, int) and heads > 0 and shape[2] % heads == 0 else 1
        masked = 'attn_mask' in values
        site = AttentionSite(
            name, type(module).__name__, attribute, shape, shape, shape, first[1].dtype, num_heads, masked=masked
        )
        operation: Any = self.operation
        anywhere = replace(site, name='', class_name='', attribute='')
        site = replace(site, num_parameters=_rehearse(operation, anywhere))
        graph = _calling(attribute, list(values), masked)
        trace = Trace(forward_signature(type(module)), values, {True: graph, False: graph}, (), frozenset())
        reading = Reading(trace, {}, {})
        guards = tuple(_unread_constants(reading, trace.graphs))
        source, bindings = graph_source(type(module), replace(trace, guards=guards), trace.graphs)
        edit = _compiled(Edit(type(module), source, bindings, (attribute,), 'core', self.operation))
        return Placement((site,), edit, None, Swapping({}, trace.graphs, {}))


def _calling(attribute: str, arguments: list[str], masked: bool) -> fx.Graph:
    """A graph that hands its first argument, and the mask, to a child."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in arguments}
    passed = (nodes[arguments[0]], *([nodes['attn_mask']] if masked else []))
    graph.output(graph.call_module(attribute, passed))
    return graph


def _compiled(edit: Edit) -> Edit:
    try:
        patched_class(edit)
    except Exception as error:
        raise Refused(f'no class can be made for it: {type(error).__name__}: {error}') from error
    return edit


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += '_'
    return name


def _check_sources(core: Core, values: dict[fx.Node, Any]) -> None:
    """Raises Refused unless the queries come from the same data as keys and values."""
    query, others = (_data_arguments(nodes, values) for nodes in ([core.query], [core.key, core.value]))
    if not query:
        raise Refused("its queries are not computed from the module's input")
    if not query & others:
        names = ', '.join(sorted(query))
        raise Refused(f"its queries are not computed from the module's input but from {names}")


def _data_arguments(nodes: list[fx.Node], values: dict[fx.Node, Any]) -> set[str]:
    """Names of the arguments that carry data into nodes."""
    found, waiting, seen = set(), list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node in seen or not any(layout_of(leaf) is not None for leaf in tree_leaves(values[node])):
            continue
        seen.add(node)
        if node.op == 'placeholder':
            found.add(str(node.target))
        waiting += node.all_input_nodes
    return found


def _heads(core: Core, module: nn.Module, values: dict[fx.Node, Any]) -> tuple[int, int]:
    """Number of heads and their axis, from the end; 1 where they are folded into the batch or there is one."""
    query: Tensor = values[core.query]
    if query.ndim < 2:
        raise Refused(f'its queries are {tuple(query.shape)}, which has no tokens')
    try:
        changes = [changes_along_axes(core.query, module, values, counted) for counted in ('channel', 'batch')]
    except Exception as error:
        raise Refused(f'the axes of its queries could not be told apart: {error}') from error
    tokens, last = query.ndim - 2, query.ndim - 1
    # A single change along the tokens is a seam, as between a class token and those with rotary embeddings.
    seam = 1 if query.shape[tokens] > 2 else 0
    channels, samples = (
        {axis for axis, count in enumerate(counts) if count > (seam if axis == tokens else 0)} for counts in changes
    )
    if tokens in samples:
        raise Refused('it attends over the batch, not over tokens')
    if tokens in channels:
        raise Refused('it attends over channels, not over tokens')
    if query.shape[-2] == 1:
        raise Refused('it has a single query token, for which a softmax over tokens is constant')
    if last not in channels and query.shape[-1] > 1:
        raise Refused('the channels of its queries could not be told from their tokens')
    heads = [axis for axis in channels if axis < tokens]
    if len(heads) != 1 or heads[0] in samples:
        return 1, -3
    return int(query.shape[heads[0]]), heads[0] - query.ndim


def _passes_mask(core: Core, values: dict[fx.Node, Any], operation: Swap) -> bool:
    """Whether the core's mask is an argument of the module that the new core is handed."""
    if len(core.extras) != 1 or values[core.extras[0]] is not None:
        data = [extra for extra in core.extras if _is_user_mask(extra, core, values)]
        if data and not operation.takes_pairwise_mask:
            shape = tuple(values[data[0]].shape)
            if len(shape) < 2 or shape[-2] != 1:
                raise Refused(f'it is called with a mask {shape} for pairs of tokens, which {operation} cannot honour')
        return bool(data) and len(core.extras) == 1
    return core.extras[0].op == 'placeholder'


def _is_user_mask(extra: fx.Node, core: Core, values: dict[fx.Node, Any]) -> bool:
    """Whether something added to the logits is data of its own, not a bias computed from queries or parameters."""
    given = _data_arguments([extra], values)
    return bool(given - _data_arguments([core.query, core.key], values))


def _grid(reading: Reading, tokens: int) -> tuple[int, int] | None:
    """Height and width of the token grid, where the arguments of the module tell."""
    for value in reading.trace.values.values():
        pairs = [tuple(value)] if isinstance(value, (tuple, list)) else []
        layout = layout_of(value)
        if layout is not None and isinstance(value, Tensor) and value.ndim == 4:
            pairs.append(tuple(value.shape[2:]) if layout.channel == 1 else tuple(value.shape[1:3]))
        for pair in pairs:
            if len(pair) == 2 and all(isinstance(size, int) for size in pair) and pair[0] * pair[1] == tokens:
                return pair
    return None


def _swapped(
    graph: fx.Graph, cores: dict[str, Core], masked: list[bool], reads_keys: bool, module: nn.Module, values: Any
) -> tuple[fx.Graph, dict[str, Rows]]:
    """A copy of a graph with new children in place of its cores, without what only fed the old ones."""
    copies: dict[fx.Node, fx.Node] = {}
    edited = fx.Graph()
    edited.output(edited.graph_copy(graph, copies))
    for (attribute, core), with_mask in zip(cores.items(), masked):
        output = copies[core.output]
        with edited.inserting_before(output):
            arguments = list(_arguments(edited, core, copies, reads_keys))
            if with_mask:
                arguments.append(copies[core.extras[0]])
            new = edited.call_module(attribute, tuple(arguments))
            if core.transposed:
                new = edited.call_method('transpose', (new, -2, -1))
        output.replace_all_uses_with(new)
        edited.erase_node(output)
        copies = {old: new if copy is output else copy for old, copy in copies.items()}
    _loosen_types(edited)
    prune(edited)
    known = {copies[node]: value for node, value in values.items() if node in copies}
    return edited, slice_packed(edited, module, known)


_MOVES = {'view', 'reshape', 'permute', 'transpose', 'contiguous', 'unbind', 'getitem', 'chunk', 'split', 'unflatten'}


def _loosen_types(graph: fx.Graph) -> None:
    """Lets a tensor that only lends its type be the one it was taken from, so that it need not be computed itself."""
    for node in graph.nodes:
        if node.op != 'call_method' or node.target != 'type_as':
            continue
        tensor, like = node.args
        while isinstance(like, fx.Node) and like.args and isinstance(like.args[0], fx.Node):
            name = like.target if like.op == 'call_method' else getattr(like.target, '__name__', '')
            if like.op not in ('call_method', 'call_function') or name not in _MOVES:
                break
            like = like.args[0]
        node.args = (tensor, like)


def _arguments(graph: fx.Graph, core: Core, copies: dict[fx.Node, fx.Node], reads_keys: bool) -> Iterator[fx.Node]:
    yield copies[core.query]
    if reads_keys:
        key, value = copies[core.key], copies[core.value]
        yield graph.call_method('transpose', (key, -2, -1)) if core.key_transposed else key
        yield graph.call_method('transpose', (value, -2, -1)) if core.transposed else value


def _unread_constants(reading: Reading, graphs: dict[bool, fx.Graph]) -> Iterator[Guard]:
    """Guards for arguments that were None or a constant and that only the old core looked at."""
    for name, value in reading.trace.values.items():
        if isinstance(value, (type(None), bool, int, float, str)):
            read = any(
                node.users
                for graph in graphs.values()
                for node in graph.nodes
                if node.target == name and node.op == 'placeholder'
            )
            if not read and type(value) is not int:
                yield Guard(f'{name} is None' if value is None else f'{name} == {value!r}')


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
