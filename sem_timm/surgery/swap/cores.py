"""Attention cores in a traced graph: softmax(q kᵀ) v, as one call or spelled out.

A core is a call of ``scaled_dot_product_attention``, or a product of queries and keys that reaches a softmax through
scales, biases and masks only, and from there the product with the values through nothing but dropout. Everything else
that has a softmax is told apart with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sem_timm.surgery.graphs import Values, called_module, operation_name
from sem_timm.surgery.skeleton import filled


@dataclass(frozen=True)
class Core:
    """One attention core of a graph.

    Attributes:
        output: The node that the core's result comes from.
        query: The queries, (..., N, d).
        key: The keys, (..., M, d); (..., d, M) if ``key_transposed``.
        value: The values, (..., M, d_v); (..., d_v, M) if ``transposed``.
        extras: What else goes into the logits: biases and masks.
        key_transposed: Whether the keys lie transposed already.
        transposed: Whether the result is (..., d_v, N), as in ``v @ attention.mT``.
        is_causal: Whether a token sees only those before it.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    extras: tuple[fx.Node, ...] = ()
    key_transposed: bool = False
    transposed: bool = False
    is_causal: bool = False


class NotACore(Exception):
    """A softmax that is no core of self-attention; the message says what it is."""


def find_cores(graph: fx.Graph, module: nn.Module, values: Values) -> tuple[list[Core], list[str]]:
    """The cores of a graph in the order they are executed, and the reasons why other softmaxes are none."""
    cores, reasons = [], []
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            cores.append(_called(node))
        elif _is_softmax(node, module):
            try:
                cores.append(_spelled_out(node, module, values))
            except NotACore as reason:
                reasons.append(str(reason))
    return cores, list(dict.fromkeys(reasons))


_ARGUMENTS = ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal', 'scale', 'enable_gqa')


def _called(node: fx.Node) -> Core:
    given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args)), **node.kwargs}
    mask = given.get('attn_mask')
    extras = (mask,) if isinstance(mask, fx.Node) else ()
    is_causal = given.get('is_causal') is True
    return Core(node, given['query'], given['key'], given['value'], extras, is_causal=is_causal)


def _spelled_out(softmax: fx.Node, module: nn.Module, values: Values) -> Core:
    logits, extras = _product_behind(softmax, module, values)
    query, key = _factors(logits)
    current, transposed = softmax, False
    while True:
        users = list(current.users)
        product = next((user for user in users if _is_product(user)), None)
        if product is not None:
            break
        following = next((user for user in users if _passes(user, module)), None)
        if following is None:
            following = next((user for user in users if _is_matrix_transpose(user, values)), None)
            transposed ^= following is not None
        if following is None:
            raise NotACore(_mixed('its attention weights are', users))
        current = following
    left, right = _factors(product)
    if left is current and not transposed:
        return Core(product, query, key, right, extras, key_transposed=True)
    if right is current and transposed:
        return Core(product, query, key, left, extras, key_transposed=True, transposed=True)
    raise NotACore('its attention weights meet the values in an order that is not read')


def _product_behind(softmax: fx.Node, module: nn.Module, values: Values) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The product of queries and keys that a softmax is fed by, and what was added to it."""
    current: Any = softmax.args[0] if softmax.args else softmax.kwargs.get('input')
    extras: list[fx.Node] = []
    moved: list[fx.Node] = []
    for _ in range(64):
        if not isinstance(current, fx.Node) or not isinstance(values[current], Tensor):
            break
        if _is_product(current):
            if moved:
                raise NotACore(_mixed('its logits are', moved))
            return current, tuple(extras)
        operands = [o for o in current.all_input_nodes if isinstance(values[o], Tensor)]
        if _is_elementwise(current) and operands:
            shape = values[current].shape
            whole = [o for o in operands if values[o].shape == shape] or operands[:1]
            main = next((o for o in whole if _leads_to_product(o, module, values)), whole[0])
            extras += [operand for operand in operands if operand is not main]
            current = main
        elif (_reshapes(current) or _only_adds(current, module, values)) and operands:
            extras += operands[1:]
            current = operands[0]
        elif operands and (current.op == 'call_module' or _permutes(current)):
            moved.append(current)
            current = operands[0]
        else:
            break
    raise NotACore('its softmax is not over products of queries and keys')


def _leads_to_product(node: fx.Node, module: nn.Module, values: Values) -> bool:
    if _is_product(node):
        return True
    if not (_is_elementwise(node) or _reshapes(node) or _permutes(node) or _only_adds(node, module, values)):
        return False
    sources = [source for source in node.all_input_nodes if isinstance(values[source], Tensor)]
    return any(_leads_to_product(source, module, values) for source in sources)


def _mixed(what: str, nodes: list[fx.Node]) -> str:
    names = [operation_name(node) for node in nodes]
    return f'{what} mixed before they are used ({", ".join(names) or "they are not multiplied with values"})'


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    operands = [*product.args, *product.kwargs.values()]
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        raise NotACore('its products are written with einsum, which is not read')
    first, second = operands
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


def _only_adds(node: fx.Node, module: nn.Module, values: Values) -> bool:
    """Whether a child, or a function that is no operation of torch, adds something to logits and mixes nothing."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(values[first], Tensor):
        return False
    if values[first].shape != values[node].shape:
        return False
    if node.op == 'call_function':  # such as one that timm marks as not traceable; checked in numbers with the rest
        return isinstance(node.target, FunctionType) and not node.target.__module__.startswith('torch')
    called = called_module(node, module) if node.op == 'call_module' else None
    if not isinstance(called, nn.Module) or len(node.args) != 1 or node.kwargs:
        return False
    generator = torch.Generator().manual_seed(0)
    copy = filled(called, generator)
    shape = (1, *values[first].shape[1:])
    try:
        with torch.no_grad():
            plain = copy(torch.zeros(shape))
            inputs = torch.rand(shape, generator=generator)
            return bool(torch.allclose(copy(inputs), inputs + plain, atol=1e-4))
    except Exception:  # it does not take a batch of one
        return False


_PRODUCTS: tuple[Callable[..., Any], ...] = (torch.matmul, operator.matmul, torch.bmm, torch.einsum)
_SOFTMAXES: tuple[Callable[..., Any], ...] = (torch.softmax, F.softmax)
_ELEMENTWISE: tuple[Callable[..., Any], ...] = (
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.itruediv,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.where,
    torch.clamp,
)
_ELEMENTWISE_METHODS = {'add', 'add_', 'sub', 'sub_', 'mul', 'mul_', 'div', 'div_', 'masked_fill', 'masked_fill_'}
_ELEMENTWISE_METHODS |= {'clamp', 'clamp_', 'to', 'type', 'type_as', 'float', 'contiguous', 'expand'}
_CASTS = {'to', 'type', 'type_as', 'float', 'half', 'contiguous'}
_RESHAPES = {'view', 'reshape', 'flatten', 'unflatten', 'unsqueeze', 'squeeze'}


def _is_product(node: fx.Node) -> bool:
    if node.op == 'call_method':
        return node.target in ('matmul', 'bmm', '__matmul__')
    return node.op == 'call_function' and node.target in _PRODUCTS


def _is_softmax(node: fx.Node, module: nn.Module) -> bool:
    if node.op == 'call_module':
        return isinstance(called_module(node, module), nn.Softmax)
    if node.op == 'call_method':
        return node.target == 'softmax'
    return node.op == 'call_function' and node.target in _SOFTMAXES


def _is_elementwise(node: fx.Node) -> bool:
    if node.op == 'call_method':
        return node.target in _ELEMENTWISE_METHODS
    named = operation_name(node) == 'maybe_add_mask'
    return node.op == 'call_function' and (node.target in _ELEMENTWISE or named)


def _reshapes(node: fx.Node) -> bool:
    return node.op in ('call_method', 'call_function') and operation_name(node) in _RESHAPES


def _permutes(node: fx.Node) -> bool:
    return node.op in ('call_method', 'call_function') and operation_name(node) in (
        'permute',
        'transpose',
        'movedim',
        'mT',
    )


def _passes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node hands attention weights on as they are, but for dropout and type."""
    if node.op == 'call_module':
        return isinstance(called_module(node, module), (nn.Dropout, nn.Identity))
    if node.op == 'call_function':
        return node.target in (F.dropout, torch.dropout)
    return node.op == 'call_method' and node.target in _CASTS


def _is_matrix_transpose(node: fx.Node, values: Values) -> bool:
    if node.op == 'call_function' and node.target is getattr:
        return bool(node.args[1] == 'mT')
    if node.op not in ('call_method', 'call_function') or not isinstance(values[node], Tensor):
        return False
    ndim = values[node].ndim
    if operation_name(node) != 'transpose' or not all(isinstance(axis, int) for axis in node.args[1:3]):
        return False
    axes: Any = node.args[1:3]
    return bool({axis % ndim for axis in axes} == {ndim - 1, ndim - 2})
