"""Whose memory a tensor is: found once, from the storages of values on the meta device, which torch shares as always.

For example, of a child that flattens its input and one that normalises it,

    y = self.flatten(x)   # y shows numbers of x: who changes y changes x
    y = self.norm(x)      # y has numbers of its own

the first passes on its input. What a child returned in the probe is linked again to what it is given in a graph that is
evaluated, so that all values of a graph tell the truth about one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.meta.layout import Layout, layout_of, set_layout
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.probing import Call
from sem_timm.meta.state import State
from sem_timm.meta.vocabulary import EITHER, PASSING_LAYERS, word_of
from sem_timm.surgery.bytecode import names_called, names_called_by
from sem_timm.surgery.graphs import Values


class Shown(NamedTuple):
    """Whose numbers a tensor that a call returned shows, and which of them.

    Attributes:
        place: Place of the other tensor among all that was given, followed by the tensors returned before this one.
        behind: How many numbers behind the first of the other one it begins.
        stride: Its strides; none where the tensor is the other one itself.
    """

    place: int
    behind: int
    stride: tuple[int, ...]


# For each tensor that a call returned what it shows of others, or None.
Passing = Sequence[Shown | None]


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
    passing: list[Shown | None] = []
    for tensor in tensors_in(call.output):
        earlier = [(place, other) for place, other in enumerate(known) if isinstance(other, Tensor)]
        itself = (each for each in earlier if each[1] is tensor)
        found = next(itself, next((each for each in earlier if share_memory(each[1], tensor)), None))
        if found is None:
            passing.append(None)
        else:
            behind = int(tensor.storage_offset() - found[1].storage_offset())
            passing.append(Shown(found[0], behind, () if found[1] is tensor else tensor.stride()))
        known.append(tensor)
    return passing


def passed_on_in_either_mode(called: Any, call: Call) -> Passing:
    """As `passed_on`, with what a child, or a method, would pass on in training; the call was one in eval mode."""
    passing = passed_on(call)
    if not _asks_for_mode(called):
        return passing
    in_training = passed_on(_in_training(called, call))
    # In training a child may return more, or less: then only what it does in eval mode is known.
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
    if all(entry is None for entry in passing):
        return output
    known, entries = tree_leaves((args, kwargs)), iter(passing)

    def link(tensor: Tensor) -> Tensor:
        entry = next(entries)
        known.append(tensor if entry is None else _shown_by(known[entry.place], tensor, entry))
        shown: Tensor = known[-1]
        return shown

    return tree_map_only(Tensor, link, output)


def _shown_by(given: Any, like: Tensor, shown: Shown) -> Tensor:
    """A tensor of the form of another that shows of the numbers of ``given`` those that it should."""
    if not isinstance(given, Tensor) or given.dtype != like.dtype or given.layout is not torch.strided:
        return like
    if not shown.stride and given.shape == like.shape:
        return given
    available = given.untyped_storage().nbytes() // given.itemsize
    # Numbers that stand for a slice have no gaps, as it had: then the first ones are shown, to be on the safe side.
    for stride, behind in ((shown.stride, shown.behind), (like.stride(), 0)):
        first = given.storage_offset() + behind
        last = first + sum((size - 1) * step for size, step in zip(like.shape, stride))
        if len(stride) == like.ndim and like.numel() and first >= 0 and last < available:
            view = given.as_strided(like.shape, stride, first)
            return view if layout_of(like) is None else set_layout(view, layout_of(like) or Layout())
    return like


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
