"""A swapped forward against the original, in numbers: all but the core must compute what it computed before.

Both run on a copy of the module with random weights. In the swapped one a stand-in for the new core hands on what the
old core returned, and remembers what it was given. Then queries, keys and values must be the old core's, and the
module's result the old result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.errors import TraceError
from sem_timm.surgery.evaluate import values_of
from sem_timm.surgery.placement import Placement
from sem_timm.surgery.rewrite import patched_class
from sem_timm.surgery.skeleton import filled
from sem_timm.surgery.swap.cores import Core


def verify_swap(placement: Placement, module: nn.Module, reads_keys: bool) -> None:
    """Compares the swapped forward of a module of a weightless copy with the original one, in eval mode.

    Raises:
        TraceError: If they differ in more than the core, or one of them cannot be run by itself.
    """
    reading = placement.reading
    assert reading is not None
    cores: dict[str, Core] = placement.swapping.cores[False]
    graph = reading.trace.graphs[False]
    name = f'{type(module).__name__}.forward'
    try:
        numbers = torch.Generator().manual_seed(0)
        copy = filled(module, numbers)
        arguments = tree_map_only(Tensor, lambda t: _random(t, numbers), reading.trace.values)
        output = next(iter(reversed(graph.nodes)))
        wanted = [node for core in cores.values() for node in (core.query, core.key, core.value, core.output)]
        values = values_of(graph, copy, arguments, [output, *wanted])
        seen: dict[str, tuple[Any, ...]] = {}
        for attribute, core in cores.items():
            copy.__dict__[attribute] = _stand_in(attribute, core, values, seen)
        copy.__class__ = patched_class(placement.edit)
        with torch.no_grad():
            result = copy(**arguments)
    except Exception as error:
        raise TraceError(f'{name} cannot be checked by itself: {type(error).__name__}: {error}') from error
    if not all(map(_alike, tree_leaves(result), tree_leaves(values[output]))):
        raise TraceError(f'{name}: swapped, it computes something else around its core')
    for attribute, core in cores.items():
        expected = [values[core.query]]
        if reads_keys:
            key, value = values[core.key], values[core.value]
            expected += [key.mT if core.key_transposed else key, value.mT if core.transposed else value]
        if not all(map(_alike, seen[attribute], expected)):
            raise TraceError(f'{name}: swapped, its core gets something else')


def _stand_in(attribute: str, core: Core, values: dict[fx.Node, Any], seen: dict[str, tuple[Any, ...]]) -> Any:
    def stand_in(*inputs: Any) -> Tensor:
        seen[attribute] = inputs
        result: Tensor = values[core.output]
        return result.mT if core.transposed else result

    return stand_in


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)
    return torch.zeros(like.shape, dtype=like.dtype)


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return bool(first == second)
    # Fewer rows in a matrix product may change the order of its sums, hence not bit for bit.
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 5e-2
    return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
