"""Which of the tensors that a child returns are those it was given: a change of the one in place changes the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.skeleton import Call
from sem_timm.surgery.state import State

# For each tensor that is returned the place among those given of the one that it is, or is a view of, or None.
Passing = Sequence[int | None]


def passed_on(call: Call) -> Passing:
    """What a call returned of that which it was given."""
    given = [leaf for leaf in enumerate(tree_leaves((call.args, call.kwargs))) if isinstance(leaf[1], Tensor)]
    itself = {id(leaf): index for index, leaf in reversed(given)}
    viewed = {_memory(leaf): index for index, leaf in reversed(given)}
    returned = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    return [itself.get(id(leaf), viewed.get(_memory(leaf))) for leaf in returned]


def _memory(tensor: Tensor) -> int:
    """What all views of one tensor have in common; on the meta device there is no address."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


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
            return passed_on(Call(call.args, call.kwargs, child.forward(*call.args, **call.kwargs)))
    except Exception:  # it does not run on the meta device in training, such as one that looks at numbers
        return passed_on(call)
    finally:
        for state in states:
            state.restore()
