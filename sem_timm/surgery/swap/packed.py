"""Packed projections, such as one linear layer for queries, keys and values: only the rows that are read are computed.

The layer keeps its weight, name and shape; the forward takes a part of it. Which rows are read is seen by counting the
channels; they may be one range, or the same range of every head. For example, where only queries are read,

    q, k, v = self.qkv(x).chunk(3, dim=-1)
    q = projected_rows(x, self.qkv, last=384, period=1152).chunk(1, dim=-1)[0]

of 1,152 rows 384 are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sem_timm.meta.layout import layout_of
from sem_timm.meta.vocabulary import Kind, kind_of, looks_up, operation_name, order_of, word_of
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.swap.axes import run_on_indices, without_repeats
from sem_timm.surgery.swap.projection import divides, projected_rows
from sem_timm.surgery.swap.prune import prune
from sem_timm.surgery.swap.rows import Rows, take_rows


@dataclass(frozen=True)
class _Packed:
    """A projection, the nodes that move its output, the one that divides it, and the pieces that are read."""

    projection: fx.Node
    moves: tuple[fx.Node, ...]
    divider: fx.Node
    axis: int
    count: int
    pieces: tuple[fx.Node, ...]


def slice_packed(graph: fx.Graph, module: nn.Module, values: Values) -> tuple[dict[str, Rows], list[str]]:
    """Lets every packed projection of a pruned graph compute the rows that are read and no others.

    A child that is more than a projection, such as one with a batch norm behind it, computes all its rows as before.

    Args:
        graph: The graph, edited in place.
        module: The module it belongs to.
        values: The value of every node.

    Returns:
        The rows that are read, by name of the weight, and names of the children of which more is computed than read.
    """
    sliced: dict[str, Rows] = {}
    computed: list[str] = []
    for node in list(graph.nodes):
        packed = _packed(node, module, values)
        rows = None if packed is None else _rows(packed, module, values)
        edits = None if packed is None or rows is None else _divided(packed, rows, values)
        if packed is None or rows is None or edits is None:
            continue
        with graph.inserting_before(node):
            made = _sliced_projection(graph, node, rows, module, values)
        if made is None:
            computed.append(str(node.target))
            continue
        new, names = made
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for edited, args in edits:
            edited.args = tuple(new if arg is node else arg for arg in args)
        sliced |= names
    prune(graph, module, values)  # what only the other rows were computed from
    return sliced, computed


def _packed(node: fx.Node, module: nn.Module, values: Values) -> _Packed | None:
    if not _is_projection(node, module):
        return None
    moves: list[fx.Node] = []
    current = node
    while isinstance(values.get(current), Tensor):
        users = [user for user in current.users if not _only_looks_at(user, current)]
        # qkv[0], qkv[1] and qkv[2], or the pieces of one chunk, split or unbind.
        if users and all(_piece_index(user) is not None for user in users):  # the axis of the parts is in front
            return _Packed(node, tuple(moves), current, 0, int(values[current].shape[0]), tuple(users))
        if len(users) != 1:
            return None
        user, kind = users[0], kind_of(users[0])
        if kind is Kind.DIVISION:
            axis = _argument(user, 1 if _unbinds(user) else 2, 'dim', 0)
            pieces = tuple(user.users)
            if not isinstance(axis, int) or any(_piece_index(piece) is None for piece in pieces):
                return None
            return _Packed(node, tuple(moves), user, axis % values[current].ndim, len(values[user]), pieces)
        if kind not in (Kind.RESHAPE, Kind.PERMUTATION, Kind.COPY):
            return None
        moves.append(user)
        current = user
    return None


def _piece_index(node: fx.Node) -> int | None:
    index = node.args[1] if node.target is operator.getitem else None
    return index if type(index) is int and index >= 0 else None


def _only_looks_at(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node asks another for its shape or type and not for its values."""
    word = word_of(user)
    lent = word is not None and word.lends and user.all_input_nodes[0] is not node
    return lent or looks_up(user)


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_projection(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a linear layer as a function, or a child with weights."""
    if node.op != 'call_module':
        return node.target is F.linear and isinstance(_argument(node, 1, 'weight'), fx.Node)
    called = called_module(node, module)
    return called is not None and len(node.args) == 1 and not node.kwargs and any(True for _ in called.parameters())


def _rows(packed: _Packed, module: nn.Module, values: Values) -> Rows | None:
    """The rows that the pieces hold, or None if they are all, or in no order."""
    try:
        found = _numbered_pieces(packed, module, values)
    except Exception:  # how the channels are moved is not known
        return None
    # Each piece now holds the numbers, from 1, of the rows that it is made of.
    read = torch.cat([without_repeats(piece).reshape(-1) for piece in found]).unique().long() - 1
    layout = layout_of(values[packed.projection])
    if layout is None or layout.channel is None or not len(read):
        return None
    total = int(values[packed.projection].shape[layout.channel])
    # Rows in one range, or in ranges of equal length at equal distance: q of each head, where heads are interleaved.
    gaps = (read.diff() > 1).nonzero().reshape(-1)
    if len(read) == total:
        return None
    if not len(gaps):
        return Rows(int(read[0]), int(read[-1]) + 1, total, total)
    groups = len(gaps) + 1
    first, last, period = int(read[0]), int(read[gaps[0]]) + 1, total // groups
    rows = (torch.arange(groups)[:, None] * period + torch.arange(first, last)).reshape(-1)
    return Rows(first, last, period, total) if rows.equal(read) else None


def _numbered_pieces(packed: _Packed, module: nn.Module, values: Values) -> Iterable[Tensor]:
    """The pieces, when the output of the projection is the number of each of its channels."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    known: Values = {}

    def given(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = part.placeholder(node.name)
            known[copies[node]] = values[node]
        return copies[node]

    given(packed.projection)
    divided = [packed.divider] if _divides(packed.divider) else []
    for node in (*packed.moves, *divided, *packed.pieces):
        copies[node] = part.node_copy(node, given)
    return run_on_indices([copies[piece] for piece in packed.pieces], module, known, 'channel').values()


_Edit = tuple[fx.Node, tuple[Any, ...]]


def _divided(packed: _Packed, rows: Rows, values: Values) -> list[_Edit] | None:
    """New arguments for the nodes between a projection and its pieces, or None if they cannot be told."""
    indices = sorted({index for piece in packed.pieces if (index := _piece_index(piece)) is not None})
    first, kept = indices[0], len(indices)
    if indices != list(range(first, first + kept)):
        return None
    edits: list[_Edit] = [(piece, (piece.args[0], (_piece_index(piece) or 0) - first)) for piece in packed.pieces]
    divider = packed.divider
    source = divider if not _divides(divider) else divider.args[0]
    assert isinstance(source, fx.Node)
    size = int(values[source].shape[packed.axis])
    if operation_name(divider) == 'chunk':
        # As many chunks as are read.
        edits.append((divider, (divider.args[0], kept, *divider.args[2:])))
    elif _divides(divider) and not _unbinds(divider) and isinstance(divider.args[1], (tuple, list)):
        sizes = list(divider.args[1])[first : first + kept]
        edits.append((divider, (divider.args[0], sizes, *divider.args[2:])))
    # Along the divided axis fewer parts are left, or fewer rows; every move before it is told its new size.
    by_one = not _divides(divider) or _unbinds(divider)
    new_size = kept if by_one else size * (rows.last - rows.first) // rows.period
    moved = _resized(packed, packed.axis, new_size, values)
    return None if moved is None else edits + moved


def _divides(node: fx.Node) -> bool:
    return kind_of(node) is Kind.DIVISION


def _unbinds(node: fx.Node) -> bool:
    return operation_name(node) == 'unbind'


def _resized(packed: _Packed, axis: int, size: int, values: Values) -> list[_Edit] | None:
    """New arguments for the moves, in which one axis of their result gets another size."""
    edits: list[_Edit] = []
    for node in reversed(packed.moves):
        if kind_of(node) is Kind.PERMUTATION:
            order = order_of(node, values[node].ndim)
            if order is None:
                return None
            axis = order[axis]
        elif kind_of(node) is Kind.RESHAPE:
            resized = _with_size(node, axis, size, values)
            if resized is None:
                return None
            if resized != node.args:
                edits.append((node, resized))
    return edits


def _with_size(node: fx.Node, axis: int, size: int, values: Values) -> tuple[Any, ...] | None:
    """The arguments of a reshape with another size on one axis of its result; None where they are not read."""
    arguments: Any = node.args
    if operation_name(node) not in ('view', 'reshape', 'unflatten') or len(arguments) < 2:
        return None
    if operation_name(node) == 'unflatten':
        sizes, offset = arguments[2], arguments[1] % values[arguments[0]].ndim
        if not isinstance(sizes, (tuple, list)) or not 0 <= axis - offset < len(sizes):
            return None
        changed = [size if place == axis - offset and entry != -1 else entry for place, entry in enumerate(sizes)]
        return (*arguments[:2], tuple(changed))
    nested = isinstance(arguments[1], (tuple, list))
    flat: list[Any] = list(arguments[1] if nested else arguments[1:])
    if isinstance(flat[axis], fx.Node):
        return None
    if flat[axis] != -1:
        flat[axis] = size
    return (node.args[0], tuple(flat)) if nested else (node.args[0], *flat)


def _sliced_projection(
    graph: fx.Graph, node: fx.Node, rows: Rows, module: nn.Module, values: Values
) -> tuple[fx.Node, dict[str, Rows]] | None:
    """A node that computes the rows, and the weights that are read in part; None if a child needs all its rows."""
    if node.op == 'call_function':
        weight, bias = _argument(node, 1, 'weight'), _argument(node, 2, 'bias')
        of_weight, sliced = take_rows(graph, weight, rows, values)
        of_bias = None if bias is None else take_rows(graph, bias, rows, values)[0]
        return graph.call_function(F.linear, (_argument(node, 0, 'input'), of_weight, of_bias)), sliced
    child, (given,), layout = called_module(node, module), node.args, layout_of(values[node])
    axis = -1 if layout is None or layout.channel == values[node].ndim - 1 else 1
    if not divides(child) or not isinstance(given, fx.Node):
        return None
    options: dict[str, Any] = {} if axis == -1 else {'axis': axis}
    options |= {'first': rows.first} if rows.first else {}
    options |= {'last': rows.last, 'period': rows.period}
    new = graph.call_function(projected_rows, (given, graph.get_attr(str(node.target))), options)
    return new, {f'{node.target}.weight': rows}
