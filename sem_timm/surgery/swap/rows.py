"""Rows of packed weights, and the nodes of a graph that take them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sem_timm.meta.vocabulary import Kind, kind_of
from sem_timm.surgery.graphs import Values


@dataclass(frozen=True)
class Rows:
    """Rows of a weight: of every ``period`` rows those from ``first`` to before ``last``.

    Attributes:
        first: The first row read.
        last: The row behind the last one read.
        period: How many rows make one repetition; all of them where there is one range.
        total: The number of rows of the weight.
    """

    first: int
    last: int
    period: int
    total: int


def take_rows(graph: fx.Graph, tensor: fx.Node, rows: Rows, values: Values) -> tuple[fx.Node, dict[str, Rows]]:
    """Lets a graph take rows from a weight or bias; where that is joined of several tensors, from those that hold them.

    Returns:
        The node of the rows, and names of parameters that are not read as a whole with the rows of each that are.
    """
    pieces = _pieces(tensor, values) if rows.period == rows.total else None
    if pieces is None:
        return _sliced(graph, tensor, rows), {str(tensor.target): rows} if tensor.op == 'get_attr' else {}
    taken: list[fx.Node] = []
    partial: dict[str, Rows] = {}
    # cat((q_bias, k_bias, v_bias)) of which the first third is read is q_bias alone.
    start = 0
    for piece in pieces:
        size = int(values[piece].shape[0])
        # The rows in this piece, counted from its own first one.
        first, last = max(rows.first - start, 0), min(rows.last - start, size)
        start += size
        if first >= last:
            continue
        if last - first < size:
            piece, names = take_rows(graph, piece, Rows(first, last, size, size), values)
            partial |= names
        taken.append(piece)
    return taken[0] if len(taken) == 1 else graph.call_function(torch.cat, (taken,)), partial


def _sliced(graph: fx.Graph, tensor: fx.Node, rows: Rows) -> fx.Node:
    if rows.period == rows.total:
        part = slice(rows.first or None, None if rows.last == rows.total else rows.last)
        return graph.call_function(operator.getitem, (tensor, part))
    # The same rows of every head: (heads * period, in) as (heads, period, in), and back.
    groups = graph.call_method('unflatten', (tensor, 0, (rows.total // rows.period, rows.period)))
    of_each = graph.call_function(operator.getitem, (groups, (slice(None), slice(rows.first, rows.last))))
    return graph.call_method('flatten', (of_each, 0, 1))


def _pieces(tensor: fx.Node, values: Values) -> list[fx.Node] | None:
    """The tensors that one is joined of along its first axis, if their sizes are known."""
    if kind_of(tensor) is not Kind.JOIN or tensor.target is torch.stack:
        return None
    given = dict(zip(('tensors', 'dim'), tensor.args)) | tensor.kwargs
    pieces, axis, joined = given['tensors'], given.get('dim', given.get('axis', 0)), values[tensor]
    if not isinstance(pieces, (tuple, list)) or not isinstance(axis, int) or axis % joined.ndim != 0:
        return None
    known = [values.get(piece) if isinstance(piece, fx.Node) else None for piece in pieces]
    alike = (isinstance(v, Tensor) and v.ndim == joined.ndim and v.dtype == joined.dtype for v in known)
    return list(pieces) if all(alike) else None
