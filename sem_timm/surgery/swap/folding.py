"""Queries that come straight from a projection: a core may multiply the weights of the two before it sees any input.

Instead of ``self.core(queries)``, such a forward says ``attend_projected(self.core, x, self.qkv, ...)``. Whether the
core then multiplies the two weights first is decided call by call; hooks, adapters and gradients see the plain way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from sem_timm.meta.layout import layout_of
from sem_timm.meta.vocabulary import MOVES, kind_of
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.swap.projection import projected_rows, rows_of_weights


def attend_projected(
    core: Any,
    x: Tensor,
    module: nn.Module,
    attn_mask: Tensor | None = None,
    *,
    num_heads: int,
    first: int = 0,
    last: int,
    period: int,
) -> Tensor:
    """What a core returns for queries that are some rows of a projection.

    Args:
        core: The core.
        x: The input of the projection, (B, N, C).
        module: The projection, or what has taken its place.
        attn_mask: The mask for the core.
        num_heads: Number of heads that the rows are divided into.
        first: The first row of every ``period``.
        last: The row behind the last one.
        period: How many rows make one repetition.

    Returns:
        (B, heads, N, value_dim).
    """
    if isinstance(x, fx.Proxy):  # of the whole model, which a trace of fx may be
        rows = dict(num_heads=num_heads, first=first, last=last, period=period)
        args = (core, x, module, attn_mask)
        return cast(Tensor, x.tracer.create_proxy('call_function', attend_projected, args, rows))
    # The core decides call by call whether multiplying the weights first is cheaper for so many tokens.
    attend = getattr(core, 'attend_folded', None)
    if attend is not None and attn_mask is None:
        weights = rows_of_weights(module, first, last, period)
        out: Tensor | None = None if weights is None else attend(x, *weights)
        if out is not None:
            return out
    queries = projected_rows(x, module, first=first, last=last, period=period)
    # Not by `unflatten`, behind which the older exporter to ONNX takes the size of the batch for a fixed one.
    queries = queries.view(*queries.shape[:-1], num_heads, -1).transpose(1, 2)
    result: Tensor = core(queries) if attn_mask is None else core(queries, attn_mask)
    return result


def fold_projections(graph: fx.Graph, cores: Iterable[str], module: nn.Module, values: Values) -> None:
    """Hands cores the projection of their queries where nothing but a division into heads lies between the two.

    Args:
        graph: The edited graph, changed in place.
        cores: Names of the new children.
        module: The module.
        values: The value of every node that the graph had before.
    """
    names = set(cores)
    for node in list(graph.nodes):
        if node.op != 'call_module' or node.target not in names:
            continue
        # Only a division into heads may lie between the two: norms or rotary embeddings need the queries themselves.
        chain = _chain_to_projection(node, module)
        if chain is None:
            continue
        projection, num_heads = chain[0], _heads(chain, values)
        if num_heads is None:
            continue
        options = {'num_heads': num_heads, **projection.kwargs}
        with graph.inserting_before(node):
            core = graph.get_attr(str(node.target))
            new = graph.call_function(attend_projected, (core, *projection.args, *node.args[1:]), options)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _chain_to_projection(core: fx.Node, module: nn.Module) -> list[fx.Node] | None:
    """The nodes from the projected rows to a core's queries, each read by the next alone."""
    chain: list[fx.Node] = []
    current = core.args[0]
    while isinstance(current, fx.Node) and len(current.users) == 1:
        chain.insert(0, current)
        if current.target is projected_rows:
            return chain if current.kwargs.keys() <= {'first', 'last', 'period'} else None
        is_identity = current.op == 'call_module' and type(called_module(current, module)) is nn.Identity
        if not (is_identity or kind_of(current) in MOVES) or not current.args:
            return None
        current = current.args[0]
    return None


def _heads(chain: list[fx.Node], values: Values) -> int | None:
    """How many heads the chain divides rows into, if that is all it does; None otherwise."""
    projection, *moves = chain
    given: Any = values.get(projection.all_input_nodes[0])
    layout = layout_of(given)
    if layout is None or not isinstance(given, Tensor) or given.ndim != 3 or layout.channel != 2:
        return None
    rows: Any = projection.kwargs
    count = rows['last'] - rows.get('first', 0)
    # Heads that are interleaved with others are no single matrix.
    if rows['period'] % count:
        return None
    # The moves are run on numbered rows; they divide into heads if what comes out is what a division would give.
    numbers = torch.arange(given.shape[0] * given.shape[1] * count).view(*given.shape[:2], count)
    env: dict[fx.Node, Any] = {projection: numbers}
    try:
        for node in moves:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else values[n])
            target: Any = node.target
            call = getattr(args[0], target) if node.op == 'call_method' else target
            env[node] = args[0] if node.op == 'call_module' else call(*args[node.op == 'call_method' :], **kwargs)
        queries = env[moves[-1]]
        heads = int(queries.shape[1])
        return heads if torch.equal(queries, numbers.unflatten(-1, (heads, -1)).transpose(1, 2)) else None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        return None
