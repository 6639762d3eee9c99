"""The edit of a graph that puts other cores in the place of its own, and drops what only fed the old ones."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.vocabulary import MOVES, Kind, kind_of, word_of
from sem_timm.surgery.graphs import Values, ancestors, called_module
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.sites import Swap
from sem_timm.surgery.swap.cores import Core, Extra
from sem_timm.surgery.swap.folding import fold_projections
from sem_timm.surgery.swap.nodes import is_matrix_transpose
from sem_timm.surgery.swap.packed import slice_packed
from sem_timm.surgery.swap.prune import prune
from sem_timm.surgery.swap.rows import Rows
from sem_timm.surgery.swap.sizes import put_sizes
from sem_timm.surgery.trace import Guard


@dataclass(frozen=True)
class SwappedGraphs:
    """How one reading was edited: what the check in numbers and the search for unread parameters start from.

    Attributes:
        cores: The cores that were replaced, by the names of the new children, for either mode.
        graphs: The edited graphs.
        sliced: The rows that are read of packed weights, by name.
        computed: Names of children that compute more rows than are read.
    """

    cores: dict[bool, dict[str, Core]]
    graphs: dict[bool, fx.Graph]
    sliced: dict[str, Rows] = field(default_factory=dict)
    computed: tuple[str, ...] = ()


def swapped(
    graph: fx.Graph,
    cores: dict[str, Core],
    masks: list[Extra | None],
    operation: Swap,
    module: nn.Module,
    values: Values,
) -> tuple[fx.Graph, dict[str, Rows], list[str]]:
    """A copy of a graph with new children in place of its cores, without what only fed the old ones.

    Args:
        graph: The graph.
        cores: Its cores, by the names of the new children.
        masks: What each is handed as its mask.
        operation: The operation; if it reads keys, queries are handed over with the scale of the old logits.
        module: The module.
        values: The value of every node.
    """
    copies: dict[fx.Node, fx.Node] = {}
    edited = fx.Graph()
    edited.output(edited.graph_copy(graph, copies))
    known = {copies[node]: value for node, value in values.items() if node in copies}
    # In the copy each core becomes a call of the new child; what only the old one read has no reader any more then.
    for (attribute, core), mask in zip(cores.items(), masks, strict=True):
        output = copies[core.output]
        with edited.inserting_before(output):
            arguments = list(_arguments(known, core, copies, operation.reads_keys))
            if mask is not None:
                arguments.append(_mask(edited, mask, copies))
            new = edited.call_module(attribute, tuple(arguments))
            if core.transposed:  # and laid out as the product that it replaces, of which a view may be taken
                new = edited.call_method('contiguous', (edited.call_method('transpose', (new, -2, -1)),))
        output.replace_all_uses_with(new)
        edited.erase_node(output)
        copies = {old: new if copy is output else copy for old, copy in copies.items()}
    _loosen_types(edited, module)
    prune(edited, module, known)
    if put_sizes(edited, module, known):
        prune(edited, module, known)
    sliced, computed = slice_packed(edited, module, known)
    if operation.folds_projection:
        fold_projections(edited, cores, module, known)
        prune(edited, module, known)
    return edited, sliced, computed


def _loosen_types(graph: fx.Graph, module: nn.Module) -> None:
    """Lets a tensor that only lends its type be the one it was taken from, so that it need not be computed itself."""
    for node in graph.nodes:
        word = word_of(node)
        if word is None or not word.lends or word.kind is not Kind.CAST:
            continue
        given: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        tensor, like = given
        # k.type_as(v) needs the type of v, not v: it is asked of what v was taken from, such as the packed projection.
        while isinstance(like, fx.Node) and like.args and isinstance(like.args[0], fx.Node):
            if kind_of(like) not in MOVES | {Kind.COPY}:  # what moves has the type of what is moved
                break
            like = like.args[0]
        node.args, node.kwargs = (tensor, _twin_behind(tensor, like, module)), {}


def _twin_behind(tensor: fx.Node, like: fx.Node, module: nn.Module) -> fx.Node:
    """The layer that a tensor comes from if another is of the same kind and reads the same: their types are equal."""
    layer = called_module(like, module) if like.op == 'call_module' else None
    for node in () if layer is None else ancestors([tensor]):
        if node.op == 'call_module' and node.args == like.args and type(called_module(node, module)) is type(layer):
            return node
    return like


def _arguments(known: Values, core: Core, copies: dict[fx.Node, fx.Node], reads_keys: bool) -> Iterator[fx.Node]:
    """The queries, and keys and values, that the new core is handed, as nodes of the copy."""
    if not reads_keys:
        yield copies[core.query]
        return
    scale, key, value = core.scale, copies[core.key], copies[core.value]
    query = _transposed(copies[scale.query], known) if scale.transposed else copies[scale.query]
    factors = [fx.Proxy(copies[factor]) for factor, _ in scale.factors]
    yield scale.of_queries(fx.Proxy(query), factors, known[copies[core.query]].shape[-1]).node
    yield _transposed(key, known) if core.key_transposed else key
    yield _transposed(value, known) if core.transposed else value


def _transposed(tensor: fx.Node, known: Values) -> fx.Node:
    """A node with the last two axes swapped; it gets a value, for those who follow what only moves."""
    if is_matrix_transpose(tensor, known):  # there and back
        return tensor.all_input_nodes[0]
    node = tensor.graph.call_method('transpose', (tensor, -2, -1))
    with LayoutMode():
        known[node] = known[tensor].transpose(-2, -1)
    return node


def _mask(graph: fx.Graph, mask: Extra, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A mask by the convention of ``scaled_dot_product_attention``: True takes part, or numbers to be added."""
    node = copies[mask.node]
    if mask.how == 'dropped':
        return graph.call_function(operator.invert, (node,))
    return graph.call_function(operator.neg, (node,)) if mask.how == 'subtracted' else node


def unread_arguments(names: Iterable[str], graphs: dict[bool, fx.Graph]) -> set[str]:
    """Those of the arguments that edited graphs no longer look at."""
    placeholders = [node for graph in graphs.values() for node in graph.nodes if node.op == 'placeholder']
    return set(names) - {str(node.target) for node in placeholders if node.users}


def guards_for_unread(reading: Reading, graphs: dict[bool, fx.Graph]) -> Iterator[Guard]:
    """Guards for arguments that were None or a constant and that only the old core looked at."""
    unread = unread_arguments(reading.trace.values, graphs)
    for name, value in reading.trace.values.items():
        if name in unread and isinstance(value, (type(None), bool, float, str)):
            yield Guard.that_equals(name, value)


def calling(attribute: str, arguments: list[str], masked: bool) -> fx.Graph:
    """A graph that hands its first argument, and the mask, to a child."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in arguments}
    passed = (nodes[arguments[0]], *([nodes['attn_mask']] if masked else []))
    graph.output(graph.call_module(attribute, passed))
    return graph
