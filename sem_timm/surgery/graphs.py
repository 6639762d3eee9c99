"""Questions about the nodes of a traced graph that every reader of graphs asks."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.meta.layout import layout_of
from sem_timm.meta.vocabulary import Kind, looks_up, word_of

Values = dict[fx.Node, Any]

_Found = TypeVar('_Found', covariant=True)


@dataclass(frozen=True)
class Verdict(Generic[_Found]):
    """What became of one node that was looked at.

    Attributes:
        node: The node, such as a sum.
        found: What it is, such as a residual add; None if it is none.
        reason: Why it is none.
        cause: The exception that said so, if it was one.
    """

    node: fx.Node
    found: _Found | None = None
    reason: str = ''
    cause: Exception | None = None


def ancestors(nodes: Iterable[fx.Node], values: Mapping[fx.Node, Any] | None = None) -> set[fx.Node]:
    """Nodes and all they are computed from; with ``values``, through tensors that are data only (no shapes)."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        # With values, a shape that was computed from data ends the way: it is no data itself.
        if node in found or (values is not None and not is_data(values[node])):
            continue
        found.add(node)
        waiting += node.all_input_nodes
    return found


def descendants(node: fx.Node) -> set[fx.Node]:
    """A node and all that is computed from it."""
    found = {node}
    for other in node.graph.nodes:  # in the order of their computation
        if not found.isdisjoint(other.all_input_nodes):
            found.add(other)
    return found


def read_by(nodes: Iterable[fx.Node], stops: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes and all whose numbers they are computed from, past questions for a shape or a type, up to some stops.

    Of ``q = self.q(x) * self.k(x).shape[-1] ** -0.5`` the keys are an ancestor, and are not read.
    """
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found or node in stops:
            continue
        found.add(node)
        word, inputs = word_of(node), node.all_input_nodes
        if looks_up(node):
            continue
        if word is not None and word.lends:  # x.view_as(y) reads x, and of y it takes the shape
            inputs = inputs[:1]
        elif word is not None and word.kind is Kind.FILL:  # torch.full_like(x, fill) takes the shape of x
            inputs = inputs[1:]
        waiting += inputs
    return found


def output_of(graph: fx.Graph) -> fx.Node:
    """The node of what a graph returns."""
    return next(iter(reversed(graph.nodes)))


def is_data(value: Any) -> bool:
    """Whether a value holds a tensor that derives from the model's input."""
    return any(layout_of(leaf) is not None for leaf in tree_leaves(value))


def called_module(node: fx.Node, module: nn.Module) -> nn.Module | None:
    """The child that a ``call_module`` node calls; None for one of the module's own methods."""
    try:
        called = operator.attrgetter(str(node.target))(module)
    except AttributeError:  # the method of a class that was followed before
        return None
    return called if isinstance(called, nn.Module) else None


def own_methods_called(graph: fx.Graph, module: nn.Module) -> set[str]:
    """The module's own methods that a graph calls as it calls children."""
    return {
        str(node.target) for node in graph.nodes if node.op == 'call_module' and called_module(node, module) is None
    }
