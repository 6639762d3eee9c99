"""The scale of an attention core: what its logits, the products of queries and keys, are multiplied by.

A new core divides by the root of its width by itself. What the old core multiplied its logits by instead has to come
with the queries, so that a core that reads keys sees the logits that the model was made for. For example

    attention = (q * self.scale) @ k.mT * self.temperature
    x = self.core(q * (self.temperature * self.scale * math.sqrt(d)), k, v)

are the same logits, where the new core divides by the root of d.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sem_timm.meta.vocabulary import Kind, kind_of, looks_up, operation_name, writes_into
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.sites import Refused
from sem_timm.surgery.swap.nodes import is_matrix_transpose


@dataclass(frozen=True)
class Step:
    """A node on the way from the product of queries and keys to the softmax.

    Attributes:
        node: The node.
        logits: Which of its operands holds the logits.
    """

    node: fx.Node
    logits: fx.Node

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies or divides the logits."""
        return kind_of(self.node) in (Kind.PRODUCT, Kind.QUOTIENT)

    @property
    def negates(self) -> bool:
        """Whether it subtracts the logits from something."""
        return kind_of(self.node) is Kind.DIFFERENCE and self.node.args[0] is not self.logits


@dataclass(frozen=True)
class Scale:
    """What a core's logits are, ``query`` times keys times ``number``, times and over some ``factors``.

    Attributes:
        query: The queries, before they are multiplied by a number.
        transposed: Whether that is (..., d, N).
        number: What does not depend on the input or on parameters.
        folded: The part of ``number`` by which the core's own queries, the old ones, are multiplied already.
        factors: Tensors and numbers of the graph, and whether logits are divided by them.
        refusal: Why the queries cannot be multiplied by it instead; empty where they can.
    """

    query: fx.Node
    transposed: bool = False
    number: float = 1.0
    folded: float = 1.0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    refusal: str = ''

    @property
    def of_products(self) -> float:
        """The number by which the products of the core's own queries and keys are multiplied."""
        return self.number / self.folded

    def of_queries(self, query: Any, factors: Iterable[Any], width: int) -> Any:
        """Queries of a width for a core that divides by its root.

        Args:
            query: What stands for `query`, (..., N, d): a tensor, or a proxy in another graph.
            factors: What stands for the nodes of `factors`.
            width: The width d of queries.
        """
        number = self.number * math.sqrt(width)
        # The usual scale and the division by the root of the width cancel, and nothing is multiplied at all.
        number = 1.0 if math.isclose(number, 1.0, rel_tol=1e-6) else number
        for (_, divides), factor in zip(self.factors, factors, strict=True):
            if divides:
                query = query / factor
                continue
            query = query * (factor if number == 1 else factor * number)
            number = 1.0
        return query if number == 1 else query * number


def check_scale(scale: Scale) -> None:
    """Raises Refused if queries cannot be multiplied by a scale in place of logits."""
    if scale.refusal:
        raise Refused(scale.refusal)


def scale_of_call(query: fx.Node, key: fx.Node, given: Any, values: Values) -> Scale:
    """The scale of a call of ``scaled_dot_product_attention`` with some ``scale``."""
    plain = _folded(query, {query, key}, values)
    if given is None:
        return replace(plain, number=plain.number / math.sqrt(values[query].shape[-1]))
    constant = _constant(given, {query, key}, values)
    if constant is None:
        return replace(plain, factors=((given, False),))
    return replace(plain, number=plain.number * constant)


def scale_of_steps(query: fx.Node, key: fx.Node, product: fx.Node, steps: list[Step], values: Values) -> Scale:
    """The scale of logits that take some steps from the product to the softmax."""
    sources = {query, *(key.all_input_nodes if is_matrix_transpose(key, values) else [])}
    plain = _folded(query, sources, values)
    number = plain.number
    sources |= set() if plain.transposed else {plain.query}
    factors: list[tuple[fx.Node, bool]] = []
    for step in steps:
        operands: tuple[Any, ...] = step.node.args
        if not step.multiplies:
            number = -number if step.negates else number
            continue
        others = [*[operand for operand in operands if operand is not step.logits], *step.node.kwargs.values()]
        divides = kind_of(step.node) is Kind.QUOTIENT
        if len(others) != 1 or (divides and operands[0] is not step.logits):
            return replace(plain, refusal=f'how its logits are scaled is not read ({operation_name(step.node)})')
        (other,) = others
        # What is one number for all inputs is multiplied out now; what is learned or depends on the input stays a node.
        constant = _constant(other, sources, values)
        if constant is not None:
            number = number / constant if divides else number * constant
            continue
        shape = tuple(values[other].shape) if isinstance(values[other], Tensor) else ()
        if not _may_scale_queries(shape, step, product, values):
            return replace(plain, refusal=f'its logits are multiplied by a tensor {shape}, which queries cannot be')
        factors.append((other, divides))
    return replace(plain, number=number, factors=tuple(factors))


def _may_scale_queries(shape: tuple[int, ...], step: Step, product: fx.Node, values: Values) -> bool:
    """Whether a factor of logits is the same for all keys, so that the queries can be multiplied by it as well."""
    # Logits are (..., N, M). A factor that differs between the M keys cannot be moved to the queries (..., N, d).
    if shape[-1:] not in ((), (1,)):
        return False
    if values[step.logits].shape != values[product].shape and math.prod(shape) != 1:
        return False  # it goes with axes that the queries do not have
    queries = (*values[product].shape[:-1], 1)
    return len(shape) <= len(queries) and torch.broadcast_shapes(shape, queries) == torch.Size(queries)


def _folded(query: fx.Node, sources: set[fx.Node], values: Values) -> Scale:
    """The number that queries are multiplied by at last, and what it multiplies."""
    # A scale in front of the product may stand before or behind a transpose: (q * s).mT and q.mT * s are one.
    scaled, transposed = query, False
    while is_matrix_transpose(scaled, values):
        scaled, transposed = scaled.all_input_nodes[0], not transposed
    kind, operands = kind_of(scaled), list(scaled.args)
    # Not in place: what is changed may be read elsewhere.
    if kind not in (Kind.PRODUCT, Kind.QUOTIENT) or writes_into(scaled) or len(operands) != 2 or scaled.kwargs:
        return Scale(query)
    if kind is Kind.PRODUCT and not (isinstance(operands[0], fx.Node) and isinstance(values[operands[0]], Tensor)):
        operands.reverse()
    first, second = operands
    if not isinstance(first, fx.Node) or not isinstance(values[first], Tensor):
        return Scale(query)
    constant = _constant(second, sources if transposed else sources | {first}, values)
    if not constant or values[first].dtype != values[query].dtype:
        return Scale(query)
    number = 1 / constant if kind is Kind.QUOTIENT else constant
    return Scale(first, transposed, number, folded=number)


def _constant(operand: Any, sources: set[fx.Node], values: Values) -> float | None:
    """A number that no input changes: one that is written, or computed from the last size of some sources."""
    if isinstance(operand, fx.Node):
        value = values[operand]
        known = isinstance(value, (int, float)) and _by_width(operand, sources, values)
        return float(value) if known else None
    return float(operand) if isinstance(operand, (int, float)) else None


def _by_width(node: fx.Node, sources: set[fx.Node], values: Values) -> bool:
    """Whether a number depends on nothing but the width of queries, the last size of sources."""
    asked = size_asked(node, values)
    if asked is not None:
        return asked[0] in sources and asked[1] == values[asked[0]].ndim - 1
    inputs = node.all_input_nodes
    if node.op != 'call_function' or not inputs or any(isinstance(values[source], Tensor) for source in inputs):
        return False
    return all(_by_width(source, sources, values) for source in inputs)


def size_asked(node: fx.Node, values: Values) -> tuple[fx.Node, int] | None:
    """The tensor and its axis, counted from the front, whose size a node looks up; None if it does something else."""
    given = (*node.args, *node.kwargs.values())
    if len(given) != 2 or not isinstance(values.get(node), int):
        return None
    source, axis = given
    if node.target is operator.getitem and isinstance(source, fx.Node) and looks_up(source):  # x.shape[-1]
        source = source.args[0]
    elif node.op != 'call_method' or node.target != 'size':
        return None
    if not isinstance(source, fx.Node) or not isinstance(values.get(source), Tensor) or not isinstance(axis, int):
        return None
    return source, axis % values[source].ndim
