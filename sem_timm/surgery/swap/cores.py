"""Attention cores in a traced graph: softmax(q kᵀ) v, as one call or spelled out.

A core is a call of ``scaled_dot_product_attention``, or a product of queries and keys that reaches a softmax through
scales, biases and masks only, and from there the product with the values through nothing but dropout. Everything else
that has a softmax is told apart with the reason. For example

    attention = (q @ k.transpose(-2, -1) * self.scale + bias).softmax(dim=-1)
    x = self.attn_drop(attention) @ v

is the core of ``q``, ``k`` and ``v``, with a scale and with ``bias`` as an extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sem_timm.meta.vocabulary import KEEPS_PLACES, Kind, kind_of, looks_up, operation_name
from sem_timm.surgery.aliasing import Memory
from sem_timm.surgery.effects import writes_in
from sem_timm.surgery.graphs import Values, Verdict, is_data
from sem_timm.surgery.swap.nodes import (
    OFF,
    bounds,
    is_matrix_transpose,
    is_softmax,
    only_adds,
    passes,
    softmax_axis,
)
from sem_timm.surgery.swap.scale import Scale, Step, scale_of_call, scale_of_steps


@dataclass(frozen=True)
class Extra:
    """A bias or mask that goes into logits.

    Attributes:
        node: The bias or mask.
        how: 'added' or 'subtracted'; 'kept' or 'dropped' for the pairs where a mask is True; 'within' for what is given
            to a call that adds something learned; 'otherwise'.
    """

    node: fx.Node
    how: str = 'added'


@dataclass(frozen=True)
class Core:
    """One attention core of a graph.

    Attributes:
        output: The node that the core's result comes from.
        query: The queries, (..., N, d).
        key: The keys, (..., M, d); (..., d, M) if ``key_transposed``.
        value: The values, (..., M, d_v); (..., d_v, M) if ``transposed``.
        scale: What the logits are multiplied by.
        extras: What else goes into the logits: biases and masks; the one that a new core is handed first.
        key_transposed: Whether the keys lie transposed already.
        transposed: Whether the result is (..., d_v, N), as in ``v @ attention.mT``.
        is_causal: Whether a token sees only those before it.
        steps: What is done to the products until the softmax, in this order; nothing in a call.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: Scale
    extras: tuple[Extra, ...] = ()
    key_transposed: bool = False
    transposed: bool = False
    is_causal: bool = False
    steps: tuple[Step, ...] = ()

    @property
    def adding(self) -> set[str]:
        """Names of the children that add something to the logits, which is learned and goes with the old core."""
        return {str(step.node.target) for step in self.steps if step.node.op == 'call_module'}

    def led_by(self, mask: Extra | None) -> Core:
        """The same core with one of its extras in front."""
        others = tuple(extra for extra in self.extras if extra is not mask)
        return self if mask is None else replace(self, extras=(mask, *others))


# What moves or changes logits so that they are products no more.
_MIXES = (Kind.PERMUTATION, Kind.MAP, Kind.DROPOUT, Kind.NORM)


class NotACore(Exception):
    """A softmax that is no core of self-attention; the message says what it is."""


def cores_of(verdicts: Iterable[Verdict[Core]]) -> list[Core]:
    """The cores among what became of softmaxes."""
    return [verdict.found for verdict in verdicts if verdict.found is not None]


def judged_softmaxes(graph: fx.Graph, module: nn.Module, values: Values) -> Iterator[Verdict[Core]]:
    """What became of every softmax and call of attention of a graph, in the order they are executed."""
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            yield Verdict(node, _called(node, values))
        elif is_softmax(node, module):
            try:
                yield Verdict(node, _spelled_out(node, module, values))
            except NotACore as error:
                yield Verdict(node, reason=str(error), cause=error)


_ARGUMENTS = ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal', 'scale', 'enable_gqa')


def _called(node: fx.Node, values: Values) -> Core:
    given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args)), **node.kwargs}
    query, key, mask, is_causal = given['query'], given['key'], given.get('attn_mask'), given.get('is_causal')
    # By the convention of torch True takes part.
    how = 'kept' if isinstance(mask, fx.Node) and getattr(values[mask], 'dtype', None) is torch.bool else 'added'
    extras = (Extra(mask, how),) if isinstance(mask, fx.Node) else ()
    is_causal = values[is_causal] if isinstance(is_causal, fx.Node) else is_causal
    scale = scale_of_call(query, key, given.get('scale'), values)
    return Core(node, query, key, given['value'], scale, extras, is_causal=is_causal is True)


def _spelled_out(softmax: fx.Node, module: nn.Module, values: Values) -> Core:
    logits, steps = _product_behind(softmax, module, values)
    _check_not_written({logits, *(step.node for step in steps)}, module, values)
    query, key = _factors(logits)
    axis, shape = softmax_axis(softmax, module, values), values[logits].shape
    # Keys times queries, k @ q.mT, have their softmax over the first axis of the two.
    flipped = axis == -2 and values[softmax].shape == shape
    if not flipped and (axis != -1 or values[softmax].shape[-1] != shape[-1]):
        raise NotACore('its softmax is not over the keys')
    current, transposed = softmax, flipped
    while True:
        users = list(current.users)
        product = next((user for user in users if kind_of(user) is Kind.MATRIX_PRODUCT), None)
        if product is not None:
            _check_read_by(product, users)
            break
        # Dropout, casts and a transpose may stand between weights and values; v @ attention.mT has the weights second.
        following = next((user for user in users if passes(user, module)), None)
        if following is None:
            following = next((user for user in users if is_matrix_transpose(user, values)), None)
            transposed ^= following is not None
        if following is None:
            raise NotACore(_mixed('its attention weights are', users))
        _check_read_by(following, users)
        current = following
    left, right = _factors(product)
    if not (left is current and not transposed) and not (right is current and transposed):
        if flipped:
            raise NotACore('its softmax is not over the keys')
        raise NotACore('its attention weights meet the values in an order that is not read')
    if flipped:
        query, key = _unflipped(query, key, steps, values)
    scale = scale_of_steps(query, key, logits, steps, values)
    # The product of queries and keys is written q @ k.mT, so the keys are transposed in it.
    value = left if transposed else right
    extras = _extras_of(steps, logits, values)
    return Core(product, query, key, value, scale, extras, not flipped, transposed, steps=tuple(steps))


def _unflipped(key: fx.Node, query: fx.Node, steps: list[Step], values: Values) -> tuple[fx.Node, fx.Node]:
    """Queries and keys of a product ``k @ q.mT``."""
    plain = all(step.multiplies or kind_of(step.node) in (Kind.CAST, Kind.COPY) for step in steps)
    numbers = all(len(_tensors_beside(step, values)) == 0 for step in steps)
    if not is_matrix_transpose(query, values) or not plain or not numbers:
        raise NotACore(
            'its keys are multiplied by its queries, and not the other way round, which is read only plainly'
        )
    return query.all_input_nodes[0], key


def _check_not_written(logits: set[fx.Node], module: nn.Module, values: Values) -> None:
    """Raises NotACore if logits are written into in lines of their own, as by ``logits.masked_fill_(mask, -inf)``."""
    nodes = next(iter(logits)).graph.nodes
    memory = Memory(values)
    for node, target in writes_in(nodes, module).items():
        if node not in logits and any(memory.shared(target, each) for each in logits):
            raise NotACore(f'its logits are written into in place ({operation_name(node)}), beside what is read')


def _check_read_by(reader: fx.Node, users: list[fx.Node]) -> None:
    others = [user for user in users if user is not reader and not looks_up(user)]
    if others:
        names = ', '.join('returned' if user.op == 'output' else operation_name(user) for user in others)
        raise NotACore(f'its attention weights are also used for something else ({names})')


def _product_behind(softmax: fx.Node, module: nn.Module, values: Values) -> tuple[fx.Node, list[Step]]:
    """The product of queries and keys that a softmax is fed by, and the steps from it."""
    current: Any = softmax.args[0] if softmax.args else softmax.kwargs.get('input')
    steps: list[Step] = []
    moved: list[fx.Node] = []
    # Back from the softmax, one operand after the other, until a product; a chain has an end, whatever a graph says.
    for _ in range(64):
        if not isinstance(current, fx.Node) or not isinstance(values[current], Tensor):
            break
        if kind_of(current) is Kind.MATRIX_PRODUCT:
            if moved:
                raise NotACore(_mixed('its logits are', moved))
            return current, steps[::-1]
        operands = [o for o in current.all_input_nodes if isinstance(values[o], Tensor)]
        if kind_of(current) in KEEPS_PLACES and operands and not bounds(current):
            shape = values[current].shape
            # Of logits + bias the logits are the operand that a product leads to, whichever is written first.
            whole = [o for o in operands if values[o].shape == shape] or operands[:1]
            main = next((o for o in whole if _leads_to_product(o, module, values)), whole[0])
            steps.append(Step(current, main))
            current = main
        elif (kind_of(current) is Kind.RESHAPE or only_adds(current, module, values)) and operands:
            steps.append(Step(current, operands[0]))
            current = operands[0]
        elif operands and (current.op == 'call_module' or kind_of(current) in _MIXES or bounds(current)):
            moved.append(current)
            current = operands[0]
        else:
            break
    raise NotACore('its softmax is not over products of queries and keys')


def _extras_of(steps: list[Step], product: fx.Node, values: Values) -> tuple[Extra, ...]:
    """What some steps add to the logits, or mask them by."""
    extras: list[Extra] = []
    for step in steps:
        # (logits + mask) * scale has another mask than the one that is added; what is switched off stays so.
        changed = ('added', 'subtracted', *(('kept', 'dropped') if step.negates else ()))
        if step.multiplies or step.negates:
            extras = [replace(extra, how='otherwise') if extra.how in changed else extra for extra in extras]
        fits = values[step.logits].shape == values[product].shape
        extras += [e if fits or e.how == 'within' else replace(e, how='otherwise') for e in _extras(step, values)]
    return tuple(extras)


def _extras(step: Step, values: Values) -> list[Extra]:
    """What a step adds to logits, or masks them by."""
    node, kind, name = step.node, kind_of(step.node), operation_name(step.node).rstrip('_')
    others = _tensors_beside(step, values)
    if kind is None:  # a child or function that only adds
        return [Extra(other, 'within') for other in others if is_data(values[other])]
    if kind in (Kind.CAST, Kind.COPY, Kind.EXPANSION, Kind.RESHAPE):
        return []
    # A scale is the same for all keys; what differs between keys is none, and comes below.
    if step.multiplies and all(values[other].shape[-1:] in ((), (1,)) for other in others):
        return []
    if name == 'masked_fill' and len(node.args) == 3:
        return [Extra(others[0], 'dropped' if _is_lowest(node.args[2], values) else 'otherwise')]
    if name == 'where' and len(node.args) == 3 and others[:1] == [node.args[0]]:
        how, fill = ('kept', node.args[2]) if node.args[1] is step.logits else ('dropped', node.args[1])
        return [Extra(others[0], how if _is_lowest(fill, values) else 'otherwise')]
    if kind is Kind.SUM and not node.kwargs:
        return [Extra(other) for other in others]
    if kind is Kind.DIFFERENCE and not step.negates and not node.kwargs:
        return [Extra(other, 'subtracted') for other in others]
    return [Extra(other, 'otherwise') for other in others]


def _tensors_beside(step: Step, values: Values) -> list[fx.Node]:
    """The tensors that a step takes beside logits."""
    return [o for o in step.node.all_input_nodes if o is not step.logits and isinstance(values[o], Tensor)]


def _is_lowest(fill: Any, values: Values) -> bool:
    """Whether a number is as low as one that switches a pair off; a stored tensor of one number is taken for that."""
    if isinstance(fill, fx.Node) and isinstance(values[fill], Tensor):
        if fill.op == 'get_attr':
            return bool(values[fill].numel() == 1)
        given = [*fill.args, *fill.kwargs.values()]
        # torch.full((), -1e9), torch.full_like(logits, -inf)
        return 'full' in operation_name(fill) and len(given) > 1 and _is_lowest(given[-1], values)
    fill = values[fill] if isinstance(fill, fx.Node) else fill
    return isinstance(fill, (int, float)) and fill <= OFF


def _leads_to_product(node: fx.Node, module: nn.Module, values: Values) -> bool:
    if kind_of(node) is Kind.MATRIX_PRODUCT:
        return True
    leads = kind_of(node) in KEEPS_PLACES or kind_of(node) in (Kind.RESHAPE, Kind.PERMUTATION)
    if not (leads or only_adds(node, module, values)):
        return False
    sources = [source for source in node.all_input_nodes if isinstance(values[source], Tensor)]
    return any(_leads_to_product(source, module, values) for source in sources)


def _mixed(what: str, nodes: list[fx.Node]) -> str:
    names = [operation_name(node) for node in nodes]
    return f'{what} mixed before they are used ({", ".join(names) or "they are not multiplied with values"})'


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    operands = [*product.args, *product.kwargs.values()]
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        raise NotACore(f'its products are written with {operation_name(product)}, which is not read')
    first, second = operands
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second
