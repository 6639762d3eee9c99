"""Which of the tensors that a child returns are those it was given, or one: who changes the one changes the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.skeleton import Call
from sem_timm.surgery.state import State

# For each tensor that is returned the place of the one that it is, or has numbers in common with, or None: among all
# that was given, followed by the tensors returned before it.
Passing = Sequence[int | None]


def passed_on(call: Call) -> Passing:
    """What a call returned of that which it was given, or twice."""
    known: list[Any] = tree_leaves((call.args, call.kwargs))
    passing = []
    for tensor in [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]:
        earlier = [(index, other) for index, other in enumerate(known) if isinstance(other, Tensor)]
        itself = (index for index, other in earlier if other is tensor)
        viewed = (index for index, other in earlier if _overlap(other, tensor))
        passing.append(next(itself, next(viewed, None)))
        known.append(tensor)
    return passing


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, which may be on the meta device, have numbers in common."""
    if first.layout is not torch.strided or second.layout is not torch.strided:
        return first is second
    storage = first.untyped_storage()
    if storage._cdata != second.untyped_storage()._cdata or not first.numel() or not second.numel():
        return False
    if first.dtype != second.dtype or len(storage) in (first.nbytes, second.nbytes):
        return True  # the one is all that there is
    seen = torch.zeros(len(storage) // first.itemsize, dtype=torch.bool)
    seen.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(seen.as_strided(second.shape, second.stride(), second.storage_offset()).any())


def passing_of_calls(
    graph: fx.Graph, module: nn.Module, values: Values, of_probe: Mapping[str, Passing], *, training: bool
) -> dict[fx.Node, Passing]:
    """What each call of a child, or of a method that is kept whole, returns of that which it is given.

    Args:
        graph: The graph.
        module: The module that it belongs to, of a weightless copy.
        values: The value of every node, children in eval mode.
        of_probe: What children passed on when they were first called; their values may be of that call.
        training: Whether children are asked in training mode, where they may pass on other things.
    """
    nodes = [node for node in graph.nodes if node.op == 'call_module']
    counts = Counter(node.target for node in nodes)
    found: dict[fx.Node, Passing] = {}
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), values.get)
        call, child = Call(args, kwargs, values[node]), called_module(node, module)
        if training and child is not None and _asks_for_mode(child):
            found[node] = _passed_on_in_training(child, call)
        elif counts[node.target] == 1 and node.target in of_probe:
            found[node] = of_probe[str(node.target)]
        else:
            found[node] = passed_on(call)
    return found


def _asks_for_mode(child: nn.Module) -> bool:
    """Whether code of a child's, beside torch's own layers, which return new tensors in training, looks at its mode."""
    classes = {type(module) for module in child.modules()}
    return any('training' in names_called(cls) for cls in classes if not cls.__module__.startswith('torch.nn.'))


def _passed_on_in_training(child: nn.Module, call: Call) -> Passing:
    states = [State(module) for module in child.modules()]
    for state in states:
        state.module.__dict__['training'] = True
    try:
        with torch.no_grad(), LayoutMode():
            output = child.forward(*call.args, **call.kwargs)
    except Exception:  # it does not run on the meta device in training, such as one that looks at numbers
        output = call.output
    finally:
        for state in states:
            state.restore()
    return passed_on(Call(call.args, call.kwargs, output))
