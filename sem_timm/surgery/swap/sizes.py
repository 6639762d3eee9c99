"""Sizes that weights or numbers in the code fix, put in for questions to tensors of which nothing else is read.

For example, where values are not read any more, of

    v = self.v(x).view(batch, -1, 16)
    y = core.reshape(batch, -1, v.shape[-1])

nothing but the second line is left, and it says 16.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from sem_timm.meta.vocabulary import Kind, kind_of, looks_up, operation_name, order_of
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.swap.scale import size_asked


def put_sizes(graph: fx.Graph, module: nn.Module, values: Values) -> bool:
    """Replaces questions for sizes that no input changes, to tensors that are asked for nothing else.

    Args:
        graph: The graph, edited in place.
        module: The module it belongs to.
        values: The value of every node.

    Returns:
        Whether there were any.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        asked = size_asked(node, values)
        if asked is not None and all(looks_up(user) for user in asked[0].users):
            size = _fixed(*asked, module, values)
            found |= {} if size is None else {node: size}
    for user in {user: None for node in found for user in node.users}:
        with_sizes: Any = map_arg((user.args, user.kwargs), lambda node: found.get(node, node))
        user.args, user.kwargs = with_sizes
    return bool(found)


def _fixed(node: fx.Node, axis: int, module: nn.Module, values: Values) -> int | None:
    """The size of a tensor along an axis, if it is one for all inputs."""
    kind, source = kind_of(node), next(iter(node.all_input_nodes), None)
    if source is not None and kind is Kind.COPY:
        return _fixed(source, axis, module, values)
    if source is not None and kind is Kind.PERMUTATION:
        order = order_of(node, values[node].ndim)
        return None if order is None else _fixed(source, order[axis], module, values)
    if operation_name(node) in ('view', 'reshape') and kind is Kind.RESHAPE:
        sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        size = sizes[axis] if axis < len(sizes) else None
        return size if isinstance(size, int) and size > 0 else None
    # A linear layer or convolution has as many channels as its weight has rows.
    called = called_module(node, module) if node.op == 'call_module' else None
    channel = values[node].ndim - 1 if isinstance(called, nn.Linear) else 1
    return int(values[node].shape[axis]) if isinstance(called, _LAYERS) and axis == channel else None


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
