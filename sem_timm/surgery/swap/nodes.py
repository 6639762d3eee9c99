"""What the nodes between a product of queries and keys and the product with the values do to logits and weights."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from sem_timm.meta.layout import is_learned, layout_of
from sem_timm.meta.skeleton import filled
from sem_timm.meta.vocabulary import PASSING_LAYERS, Kind, kind_of, order_of
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.graphs import Values, called_module

# Added to a logit, it switches a pair off, to say nothing of minus infinity; penalties that are weighed lie above.
OFF = -1e4


def is_softmax(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node is a softmax, as a function, a method or a child."""
    if node.op == 'call_module':
        return isinstance(called_module(node, module), nn.Softmax)
    return kind_of(node) is Kind.SOFTMAX


def softmax_axis(softmax: fx.Node, module: nn.Module, values: Values) -> int | None:
    """Which axis a softmax is over, from the end; None where that is not a plain number."""
    called = called_module(softmax, module) if softmax.op == 'call_module' else None
    if isinstance(called, nn.Softmax):
        axis: Any = called.dim
    else:
        axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get('dim')
    axis, ndim = values[axis] if isinstance(axis, fx.Node) else axis, values[softmax].ndim
    return axis % ndim - ndim if isinstance(axis, int) else None


def bounds(node: fx.Node) -> bool:
    """Whether a node keeps numbers within bounds that logits may reach."""
    if kind_of(node) is not Kind.BOUND:
        return False
    given = [each for each in (*node.args[1:], *node.kwargs.values()) if each is not None]
    return not all(isinstance(each, (int, float)) and abs(each) >= -OFF for each in given)


def passes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node hands attention weights on as they are, but for dropout and type."""
    if node.op == 'call_module':
        return isinstance(called_module(node, module), PASSING_LAYERS)
    return kind_of(node) in (Kind.DROPOUT, Kind.CAST, Kind.COPY)


def is_matrix_transpose(node: fx.Node, values: Values) -> bool:
    """Whether a node swaps the last two axes."""
    if kind_of(node) is not Kind.PERMUTATION or not isinstance(values[node], Tensor):
        return False
    ndim = values[node].ndim
    return order_of(node, ndim) == [*range(ndim - 2), ndim - 1, ndim - 2]


def only_adds(node: fx.Node, module: nn.Module, values: Values) -> bool:
    """Whether a child, or a function that is no operation of torch, adds something learned to logits and no more."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(values[first], Tensor):
        return False
    if not isinstance(values[node], Tensor) or values[first].shape != values[node].shape:
        return False
    generator = torch.Generator().manual_seed(0)
    given: Any = map_arg((node.args[1:], node.kwargs), values.__getitem__)
    beside = tensors_in(given)
    # A mask among them would be applied in there, where nobody sees it; an index is none.
    if any(not is_learned(each) and layout_of(each) is None for each in beside if each.dtype not in _INDICES):
        return False
    called: Any = None
    shape, learned = tuple(values[first].shape), any(map(is_learned, beside))
    if node.op == 'call_function':  # such as one that timm marks as not traceable
        is_foreign = isinstance(node.target, FunctionType) and not node.target.__module__.startswith('torch')
        called = node.target if is_foreign else None
    elif node.op == 'call_module':
        child = called_module(node, module)
        called = None if child is None else filled(child, generator)
        learned |= child is not None and next(child.parameters(), None) is not None
        tables = () if child is None else child.buffers()
        if any(each.shape[-2:] == shape[-2:] and each.dtype not in _INDICES for each in tables):
            return False
        shape = (1, *shape[1:])
    if called is None or not learned:
        return False
    others, named = tree_map_only(Tensor, lambda t: _random(t, generator), given)
    try:
        with torch.no_grad():
            # What only adds gives zeros plus something, and random logits plus the same.
            plain = called(torch.zeros(shape), *others, **named)
            inputs = torch.rand(shape, generator=generator)
            adds = torch.allclose(called(inputs.clone(), *others, **named), inputs + plain, atol=1e-4)
            return adds and bool((plain > OFF).all())
    except Exception:  # it does not take a batch of one
        return False


_INDICES = (torch.int64, torch.int32)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator)
    return torch.zeros(like.shape, dtype=like.dtype)
