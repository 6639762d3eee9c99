"""Sizes that a forward asks of a tensor: the ones that the weights fix are numbers, whatever comes in."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sem_timm.surgery.effects import looks_up
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.swap.axes import changes_along_axes, run_on_indices


def size_asked(node: fx.Node, values: Values) -> tuple[fx.Node, int] | None:
    """The tensor and its axis, counted from the front, whose size a node looks up; None if it does something else."""
    given = (*node.args, *node.kwargs.values())
    if len(given) != 2 or not isinstance(values.get(node), int):
        return None
    source, axis = given
    if node.target is operator.getitem and isinstance(source, fx.Node) and looks_up(source):
        source = source.args[0]
    elif node.op != 'call_method' or node.target != 'size':
        return None
    if not isinstance(source, fx.Node) or not isinstance(values.get(source), Tensor) or not isinstance(axis, int):
        return None
    return source, axis % values[source].ndim


def write_widths(graph: fx.Graph, originals: Mapping[fx.Node, fx.Node], module: nn.Module, values: Values) -> bool:
    """Writes widths as numbers where they are asked of a tensor that nothing else is computed from.

    So keys that only the old core read need not be computed for the sake of ``k.shape[-1] ** -0.5``.

    Args:
        graph: The edited graph, without what nothing reads; changed in place.
        originals: Nodes of the graph before the edit, by their copies.
        module: The module.
        values: The value of every node before the edit.

    Returns:
        Whether there were any.
    """
    known = {copy: values[node] for copy, node in originals.items() if node in values}
    read = _read_as_data(graph)
    widths = {
        node: known[node]
        for node in graph.nodes
        if (asked := size_asked(node, known)) is not None
        and asked[0] not in read
        and _is_width(originals[asked[0]], asked[1], module, values)
    }
    for user in {user for node in widths for user in node.users}:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: widths.get(node, node))
    return bool(widths)


def _read_as_data(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that anything is computed from, or checked with, and not asked for a shape or type alone."""
    found: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if not node.users]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += () if looks_up(node) else node.all_input_nodes
    return found


def _is_width(node: fx.Node, axis: int, module: nn.Module, values: Values) -> bool:
    """Whether an axis holds channels, each of them once, so that no input changes how many they are.

    One row of them is enough: beside it there may be learned tokens, which are not counted.
    """
    try:
        if changes_along_axes(node, module, values, 'batch')[axis]:
            return False
        channels = run_on_indices([node], module, values, 'channel')[node].movedim(axis, -1).sort(-1).values
    except RuntimeError:  # where an axis is not known
        return False
    return channels.shape[-1] > 1 and bool(channels.diff(dim=-1).all(-1).any())
