"""What the nodes between a product of queries and keys and the product with the values do to logits and weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from sem_timm.surgery.graphs import Values, called_module, operation_name
from sem_timm.surgery.skeleton import filled

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
_PERMUTATIONS = {'permute', 'transpose', 'movedim', 'mT'}


def is_product(node: fx.Node) -> bool:
    if node.op == 'call_method':
        return node.target in ('matmul', 'bmm', '__matmul__')
    return node.op == 'call_function' and node.target in _PRODUCTS


def is_softmax(node: fx.Node, module: nn.Module) -> bool:
    if node.op == 'call_module':
        return isinstance(called_module(node, module), nn.Softmax)
    if node.op == 'call_method':
        return node.target == 'softmax'
    return node.op == 'call_function' and node.target in _SOFTMAXES


def is_over_last_axis(softmax: fx.Node, module: nn.Module, values: Values) -> bool:
    called = called_module(softmax, module) if softmax.op == 'call_module' else None
    if isinstance(called, nn.Softmax):
        axis: Any = called.dim
    else:
        axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get('dim')
    axis = values[axis] if isinstance(axis, fx.Node) else axis
    return isinstance(axis, int) and axis % values[softmax].ndim == values[softmax].ndim - 1


def is_elementwise(node: fx.Node) -> bool:
    if node.op == 'call_method':
        return node.target in _ELEMENTWISE_METHODS
    named = operation_name(node) == 'maybe_add_mask'
    return node.op == 'call_function' and (node.target in _ELEMENTWISE or named)


def reshapes(node: fx.Node) -> bool:
    return node.op in ('call_method', 'call_function') and operation_name(node) in _RESHAPES


def permutes(node: fx.Node) -> bool:
    return node.op in ('call_method', 'call_function') and operation_name(node) in _PERMUTATIONS


def passes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node hands attention weights on as they are, but for dropout and type."""
    if node.op == 'call_module':
        return isinstance(called_module(node, module), (nn.Dropout, nn.Identity))
    if node.op == 'call_function':
        return node.target in (F.dropout, torch.dropout)
    return node.op == 'call_method' and node.target in _CASTS


def is_matrix_transpose(node: fx.Node, values: Values) -> bool:
    if node.op == 'call_function' and node.target is getattr:
        return bool(node.args[1] == 'mT')
    if node.op not in ('call_method', 'call_function') or not isinstance(values[node], Tensor):
        return False
    ndim = values[node].ndim
    if operation_name(node) != 'transpose' or not all(isinstance(axis, int) for axis in node.args[1:3]):
        return False
    axes: Any = node.args[1:3]
    return bool({axis % ndim for axis in axes} == {ndim - 1, ndim - 2})


def only_adds(node: fx.Node, module: nn.Module, values: Values) -> bool:
    """Whether a child, or a function that is no operation of torch, adds something to logits and mixes nothing."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(values[first], Tensor):
        return False
    if not isinstance(values[node], Tensor) or values[first].shape != values[node].shape:
        return False
    generator = torch.Generator().manual_seed(0)
    given: Any = (node.args[1:], node.kwargs)
    others, named = tree_map_only(Tensor, lambda t: _random(t, generator), map_arg(given, values.__getitem__))
    called: Any = None
    shape = tuple(values[first].shape)
    if node.op == 'call_function':  # such as one that timm marks as not traceable
        is_foreign = isinstance(node.target, FunctionType) and not node.target.__module__.startswith('torch')
        called = node.target if is_foreign else None
    elif node.op == 'call_module':
        child = called_module(node, module)
        called = None if child is None else filled(child, generator)
        shape = (1, *shape[1:])
    if called is None:
        return False
    try:
        with torch.no_grad():
            plain = called(torch.zeros(shape), *others, **named)
            inputs = torch.rand(shape, generator=generator)
            return bool(torch.allclose(called(inputs.clone(), *others, **named), inputs + plain, atol=1e-4))
    except Exception:  # it does not take a batch of one
        return False


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator)
    return torch.zeros(like.shape, dtype=like.dtype)
