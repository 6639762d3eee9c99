"""Whose memory a tensor is: found once, from the storages of values on the meta device, which torch shares as always.

For example, of a child that flattens its input and one that normalises it,

    y = self.flatten(x)   # y shows numbers of x: who changes y changes x
    y = self.norm(x)      # y has numbers of its own

the first passes on its input. What a child returned in the probe is linked again to what it is given in a graph that is
evaluated, so that all values of a graph tell the truth about one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.meta.layout import Layout, layout_of, set_layout
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.skeleton import Call
from sem_timm.meta.state import State
from sem_timm.meta.vocabulary import EITHER, PASSING_LAYERS, word_of
from sem_timm.surgery.bytecode import names_called, names_called_by
from sem_timm.surgery.graphs import Values

# For each tensor that a call returned the place of the one whose numbers it shows, or None: among all that was given,
# followed by the tensors returned before it.
Passing = Sequence[int | None]


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, in their order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, which may be on the meta device, have numbers in common."""
    if first is second or first.layout is not torch.strided or second.layout is not torch.strided:
        return first is second
    storage = first.untyped_storage()
    if storage._cdata != second.untyped_storage()._cdata or not first.numel() or not second.numel():
        return False
    # Most often the one is all that there is; else the numbers that the one shows are marked and looked for.
    if first.dtype != second.dtype or len(storage) in (first.nbytes, second.nbytes):
        return True
    seen = torch.zeros(len(storage) // first.itemsize, dtype=torch.bool)
    seen.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(seen.as_strided(second.shape, second.stride(), second.storage_offset()).any())


def passed_on(call: Call) -> Passing:
    """What a call returned of that which it was given, or returned twice."""
    known: list[Any] = tree_leaves((call.args, call.kwargs))
    passing: list[int | None] = []
    for tensor in tensors_in(call.output):
        earlier = [(index, other) for index, other in enumerate(known) if isinstance(other, Tensor)]
        itself = (index for index, other in earlier if other is tensor)
        viewed = (index for index, other in earlier if share_memory(other, tensor))
        passing.append(next(itself, next(viewed, None)))
        known.append(tensor)
    return passing


def passed_on_in_either_mode(called: Any, call: Call) -> Passing:
    """As `passed_on`, with what a child, or a method, would pass on in training; the call was one in eval mode."""
    passing = passed_on(call)
    if not _asks_for_mode(called):
        return passing
    in_training = passed_on(_in_training(called, call))
    same = len(in_training) == len(passing)
    return [new if old is None else old for old, new in zip(passing, in_training)] if same else passing


def _asks_for_mode(called: Any) -> bool:
    """Whether code of a child or method looks at its mode; torch's layers do, and return new tensors in training."""
    if not isinstance(called, nn.Module):
        return 'training' in names_called_by(type(called.__self__), called.__name__)
    classes = {type(module) for module in called.modules()}
    return any('training' in names_called(cls) for cls in classes if not cls.__module__.startswith('torch.nn.'))


def _in_training(called: Any, call: Call) -> Call:
    module, forward = (called, called.forward) if isinstance(called, nn.Module) else (called.__self__, called)
    states = [State(each) for each in module.modules()]
    for state in states:
        state.module.__dict__['training'] = True
    try:
        with torch.no_grad(), LayoutMode():
            output = forward(*call.args, **call.kwargs)
    except Exception:  # it does not run on the meta device in training, such as one that looks at numbers
        output = call.output
    finally:
        for state in states:
            state.restore()
    return Call(call.args, call.kwargs, output)


def linked(output: Any, passing: Passing, args: Any, kwargs: Any) -> Any:
    """An output that shows the numbers of what is given now, where that of the recorded call showed what it was given.

    Args:
        output: What the recorded call returned.
        passing: What it passed on.
        args: What is given by place.
        kwargs: What is given by name.
    """
    if all(index is None for index in passing):
        return output
    known, places = tree_leaves((args, kwargs)), iter(passing)

    def link(tensor: Tensor) -> Tensor:
        place = next(places)
        known.append(tensor if place is None else shown_by(known[place], tensor))
        shown: Tensor = known[-1]
        return shown

    return tree_map_only(Tensor, link, output)


def shown_by(given: Any, like: Tensor) -> Tensor:
    """A tensor of the form of another that shows numbers of a third, as far as it has as many."""
    if not isinstance(given, Tensor) or given.dtype != like.dtype or given.layout is not torch.strided:
        return like
    if given.shape == like.shape:
        return given
    needed = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride()))
    if not like.numel() or given.storage_offset() + needed > given.untyped_storage().nbytes() // given.itemsize:
        return like
    view = given.as_strided(like.shape, like.stride())
    return view if layout_of(like) is None else set_layout(view, layout_of(like) or Layout())


class Memory:
    """Which values of a graph have numbers in common.

    Args:
        values: The values of its nodes; a node without one has numbers of its own.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self._tensors: dict[fx.Node, list[Tensor]] = {}

    def shared(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether the numbers of two nodes overlap, or might in a model of another type or layout in memory."""
        if first is second:
            return True
        mine, others = self._of(first), self._of(second)
        return any(share_memory(one, other) for one in mine for other in others)

    def is_view(self, node: fx.Node, called: nn.Module | None) -> bool:
        """Whether a node shows numbers of its first operand and reads none of them."""
        if not node.all_input_nodes or (node.op == 'call_module' and not isinstance(called, PASSING_LAYERS)):
            return False
        return self.shared(node, node.all_input_nodes[0])

    def _of(self, node: fx.Node) -> list[Tensor]:
        if node not in self._tensors:
            tensors, word = tensors_in(self.values.get(node)), word_of(node)
            # A cast of a float32 model is none in another type.
            if word is not None and word.memory == EITHER and node.all_input_nodes:
                tensors = tensors + self._of(node.all_input_nodes[0])
            self._tensors[node] = tensors
        return self._tensors[node]
