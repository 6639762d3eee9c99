"""A swapped forward against the original, in numbers: all but the core must compute what it computed before.

Both run on a copy of the module with random weights. In the swapped one a stand-in for the new core hands on what the
old core returned, and remembers what it was given. Then queries, keys and values must be the old core's, with its
scale, and the module's result the old result.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.errors import TraceError
from sem_timm.surgery.evaluate import values_of
from sem_timm.surgery.placement import Placement
from sem_timm.surgery.rewrite import patched_class
from sem_timm.surgery.skeleton import filled
from sem_timm.surgery.stand_in import cloned
from sem_timm.surgery.state import outline
from sem_timm.surgery.swap.cores import Core


def verify_swap(placement: Placement, module: nn.Module, reads_keys: bool) -> None:
    """Compares the swapped forward of a module of a weightless copy with the original one, in either mode.

    Raises:
        TraceError: If they differ in more than the core, or one of them cannot be run by itself.
    """
    assert placement.reading is not None
    graphs = placement.reading.trace.graphs
    for training in (False, True) if graphs[True] is not graphs[False] else (False,):
        _verify_mode(placement, module, reads_keys, training)


def _verify_mode(placement: Placement, module: nn.Module, reads_keys: bool, training: bool) -> None:
    reading = placement.reading
    assert reading is not None
    cores: dict[str, Core] = placement.swapping.cores[training]
    graph = reading.trace.graphs[training]
    name = f'{type(module).__name__}.forward' + (' in training' if training else '')
    try:
        # Three copies with equal weights: what one run leaves behind on its copy is not there before the next.
        first, old, new = (_filled(module, training) for _ in range(3))
        numbers = torch.Generator().manual_seed(1)
        arguments = tree_map_only(Tensor, lambda t: _random(t, numbers), reading.trace.values)
        output = next(iter(reversed(graph.nodes)))
        with torch.no_grad(), _WithoutDropout():
            outputs = [core.output for core in cores.values()]
            wanted = [output, *chain(*map(_nodes, cores.values()))]
            values = values_of(graph, first, cloned(arguments), wanted, outputs)
            original, left = _run(old, cloned(arguments))
            seen: dict[str, tuple[Any, ...]] = {}
            for attribute, core in cores.items():
                new.__dict__[attribute] = _stand_in(attribute, core, values, seen)
            new.__class__ = patched_class(placement.edit)
            result, left_by_new = _run(new, cloned(arguments), left)
    except Exception as error:
        raise TraceError(f'{name} cannot be checked by itself: {type(error).__name__}: {error}') from error
    if not _caches_tensors(module) and not _all_alike(tree_leaves(original), tree_leaves(values[output])):
        raise TraceError(f'{name}: its trace computes something else, perhaps for lack of what it changes in place')
    if not _all_alike(tree_leaves(result), tree_leaves(values[output])):
        raise TraceError(f'{name}: swapped, it computes something else around its core')
    if not _all_alike(tree_leaves(left), tree_leaves(left_by_new)):
        raise TraceError(f'{name}: swapped, it leaves its arguments, buffers or attributes in another state')
    for attribute, core in cores.items():
        inputs = seen[attribute]
        if not _all_alike(inputs[: 3 if reads_keys else 1], _expected(core, values, reads_keys)):
            raise TraceError(f'{name}: swapped, its core gets something else')
        if reads_keys and not core.extras and not _attends_alike(core, values, inputs):
            raise TraceError(f'{name}: softmax(q k / sqrt(d)) v is not what its core computes')


def _filled(module: nn.Module, training: bool) -> Any:
    copy = filled(module, torch.Generator().manual_seed(0))
    copy.__dict__['training'] = training  # its own flag alone: children draw nothing and count nothing
    return copy


def _run(copy: nn.Module, arguments: dict[str, Any], like: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """What a module returns, and what it has left where others see it; with ``like`` no more than is in there."""
    result = copy(**arguments)
    left = {**outline(copy, _shape_of), **dict(copy.named_buffers()), 'arguments': arguments}
    return result, left if like is None else {name: left.get(name) for name in like}


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _caches_tensors(module: nn.Module) -> bool:
    """Whether a module keeps tensors that it once computed from its weights, which random weights would not fit."""
    kept = (vars(part).items() for part in module.modules())
    values = [value for pairs in kept for name, value in pairs if name not in ('_parameters', '_buffers', '_modules')]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(values))


def _nodes(core: Core) -> list[fx.Node]:
    factors = [factor for factor, _ in core.scale.factors]
    return [core.query, core.key, core.value, core.output, core.scale.query, *factors]


def _expected(core: Core, values: dict[fx.Node, Any], reads_keys: bool) -> list[Tensor]:
    query, key, value = values[core.query], values[core.key], values[core.value]
    if not reads_keys:
        return [query]
    factors = [values[factor] for factor, _ in core.scale.factors]
    query = core.scale.of_queries(values[core.scale.query], factors, query.shape[-1])
    return [query, key.mT if core.key_transposed else key, value.mT if core.transposed else value]


def _attends_alike(core: Core, values: dict[fx.Node, Any], inputs: tuple[Any, ...]) -> bool:
    """Whether plain attention, which divides by the root of the width, returns what the old core did."""
    query, key, value = inputs[:3]
    result = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value
    return _alike(result, values[core.output].mT if core.transposed else values[core.output])


class _WithoutDropout(TorchFunctionMode):
    """Lets dropout that a forward calls as a function do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, torch.dropout):
            return args[0] if args else kwargs['input']
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif 'dropout_p' in kwargs:
                kwargs['dropout_p'] = 0.0
        return func(*args, **kwargs)


def _stand_in(attribute: str, core: Core, values: dict[fx.Node, Any], seen: dict[str, tuple[Any, ...]]) -> Any:
    def stand_in(*inputs: Any) -> Tensor:
        seen[attribute] = inputs
        result: Tensor = values[core.output].clone()
        return result.mT if core.transposed else result

    return stand_in


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)
    return torch.zeros(like.shape, dtype=like.dtype)


def _all_alike(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(map(_alike, first, second))


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return bool(first == second)
    # Fewer rows in a matrix product may change the order of its sums, hence not bit for bit.
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 5e-2
    return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
