"""What nodes of a graph need: what they are computed from, and what writes into that in place on the way."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import fx, nn

from sem_timm.surgery.graphs import ancestors, called_module, operation_name

# What may return its operand, or a view of it.
_VIEWS = {'view', 'view_as', 'reshape', 'reshape_as', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'expand'}
_VIEWS |= {
    'permute',
    'transpose',
    'movedim',
    'swapaxes',
    'mT',
    'T',
    'diagonal',
    'narrow',
    'select',
    'getitem',
    'unbind',
}
_VIEWS |= {
    'chunk',
    'split',
    'split_with_sizes',
    'contiguous',
    'to',
    'type',
    'type_as',
    'float',
    'half',
    'detach',
    'data',
}
_LOOKUPS = {'size', 'dim', 'numel'}
_IN_PLACE: set[Callable[..., Any]] = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}

# A node or the name of an attribute, and the numbered pieces that were taken of it one after the other.
_Place = tuple[Any, ...]


def needed_for(nodes: Iterable[fx.Node], module: nn.Module) -> set[fx.Node]:
    """The nodes that some nodes are computed from, those included that write into what is read of it afterwards.

    Args:
        nodes: The nodes, all of one graph.
        module: The module that the graph belongs to.
    """
    wanted = list(nodes)
    order = {node: position for position, node in enumerate(wanted[0].graph.nodes)}
    writes = {node: target for node in order if (target := _target_of_write(node, module)) is not None}
    found = ancestors(wanted)
    if not writes.keys() - found:
        return found
    places = _places(order, writes, module)
    while True:
        readers = [node for node in found if node in writes or not (_is_view(node, module) or looks_up(node))]
        reads = [(order[node], places[source]) for node in readers for source in node.all_input_nodes]
        reads += [(len(order), places[node]) for node in wanted]
        missing = [
            node
            for node, target in writes.items()
            if node not in found
            and (
                _is_seen_outside(places[target])
                or any(at > order[node] and _overlap(place, places[target]) for at, place in reads)
            )
        ]
        if not missing:
            return found
        found |= ancestors(missing)


def is_written_after(node: fx.Node, operand: fx.Node, module: nn.Module, passing: Collection[str]) -> bool:
    """Whether a later statement writes into an operand of a node, under whatever name, other than the node itself.

    Args:
        node: The node.
        operand: One of its operands.
        module: The module that the graph belongs to.
        passing: Names of the children that return what they are given.
    """
    order = {each: position for position, each in enumerate(node.graph.nodes)}
    writes = {each: target for each in order if (target := _target_of_write(each, module)) is not None}
    later = [target for write, target in writes.items() if order[write] > order[node]]
    if not later:
        return False
    places = _places(order, writes, module, passing)
    return any(_overlap(places[target], places[operand]) for target in later)


def _target_of_write(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The node whose data a node overwrites."""
    if isinstance(node.kwargs.get('out'), fx.Node):
        return node.kwargs['out']  # type: ignore[return-value]
    name = operation_name(node)
    writes = node.op in ('call_method', 'call_function') and name.endswith('_') and not name.endswith('__')
    if node.op == 'call_function':
        writes |= node.target in _IN_PLACE or node.kwargs.get('inplace') is True
        writes |= getattr(node.target, '__module__', '') == 'torch.nn.functional' and node.args[-1:] == (True,)
    elif node.op == 'call_module':
        writes = getattr(called_module(node, module), 'inplace', False) is True
    return node.all_input_nodes[0] if writes and node.all_input_nodes else None


def _places(
    nodes: Iterable[fx.Node], writes: dict[fx.Node, fx.Node], module: nn.Module, passing: Collection[str] = ()
) -> dict[fx.Node, _Place]:
    """Where the data of each node lies."""
    places: dict[fx.Node, _Place] = {}
    for node in nodes:
        source = writes.get(node)
        passes = node.op == 'call_module' and node.target in passing and bool(node.all_input_nodes)
        if source is None and (passes or _is_view(node, module)):
            source = node.all_input_nodes[0]
        if source is None:
            places[node] = (node.target,) if node.op == 'get_attr' else (node,)
            continue
        index = node.args[1] if node.target is operator.getitem else None
        places[node] = (*places[source], (source, index)) if type(index) is int and index >= 0 else places[source]
    return places


def _is_view(node: fx.Node, module: nn.Module) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == 'call_module':
        return isinstance(called_module(node, module), (nn.Identity, nn.Dropout, nn.Flatten))
    name = node.args[1] if node.target is getattr else operation_name(node)
    return node.op in ('call_method', 'call_function') and name in _VIEWS


def looks_up(node: fx.Node) -> bool:
    """Whether a node asks for a shape or type and reads no data."""
    if node.target is getattr:
        return node.args[1] not in _VIEWS
    return node.op == 'call_method' and node.target in _LOOKUPS


def _is_seen_outside(place: _Place) -> bool:
    """Whether others than the graph see it: it is an argument's data, or an attribute's."""
    return not isinstance(place[0], fx.Node) or place[0].op == 'placeholder'


def _overlap(first: _Place, second: _Place) -> bool:
    """Whether two places may have data in common: pieces of one tensor with different numbers have none."""
    if first[0] != second[0]:
        return False
    for one, other in zip(first[1:], second[1:]):
        if one[0] is not other[0]:
            return True
        if one[1] != other[1]:
            return False
    return True
