"""Which axes of a tensor inside a forward hold channels, and which hold samples of the batch.

Shapes cannot tell the head axis from the token axis, nor tokens from channels. So a part of the graph is run on real
numbers that are an index: every layer hands on its input, or the number of each output channel (or sample), and all
that moves data does so as always. An axis along which the result varies holds what was counted. For example

    q = self.q(x)                                  # (2, 5, 12): each token is 1, 2, ..., 12
    q = q.reshape(2, 5, 3, 4).transpose(1, 2)      # (2, 3, 5, 4): head 0 has 1 to 4, head 1 has 5 to 8

varies along axes 1 and 3 when channels are counted: heads and channels. Along axis 2, the tokens, it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from sem_timm.meta.layout import layout_of
from sem_timm.meta.vocabulary import Kind, kind_of
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.evaluate import run_part
from sem_timm.surgery.graphs import Values, called_module, is_data

Counted = Literal['channel', 'batch']


def changes_along_axes(node: fx.Node, module: nn.Module, values: Values, counted: Counted) -> list[int]:
    """How often a node's value changes along each of its axes when channels, or samples, are counted.

    Raises:
        RuntimeError: If the part of the graph before the node does not run on index numbers.
    """
    result = without_repeats(run_on_indices([node], module, values, counted)[node])
    changes = ((result.diff(dim=axis) != 0).movedim(axis, 0).flatten(1).any(1) for axis in range(result.ndim))
    return [int(change.sum()) for change in changes]


def without_repeats(tensor: Tensor) -> Tensor:
    """A tensor with one entry along each axis that repeats one in memory: what an index is mostly made of."""
    # An expanded index has a stride of zero along all axes but the one that is counted.
    repeated = [axis for axis, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[axis] > 1]
    for axis in repeated:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


def run_on_indices(
    nodes: Iterable[fx.Node], module: nn.Module, values: Values, counted: Counted
) -> dict[fx.Node, Tensor]:
    """The values of nodes when every layer returns the index of each channel or sample instead of features."""
    wanted = list(nodes)
    graph, part = wanted[0].graph, needed_for(wanted, module, values)
    try:
        return run_part(_Indices(module, graph, values, counted, in_full=False), wanted, part)
    except RuntimeError:  # what is written into, or viewed as one axis where it was two, must be there in memory
        return run_part(_Indices(module, graph, values, counted, in_full=True), wanted, part)


class _Indices(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, values: Values, counted: Counted, in_full: bool) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.known, self.counted, self.in_full = values, counted, in_full

    def run_node(self, n: fx.Node) -> Any:
        if n.op == 'placeholder':
            return tree_map_only(Tensor, self._counted, self.known[n])
        value = self.known.get(n)  # an edited graph has nodes that were never evaluated
        # What comes of no data, such as the angles of rotary embeddings, has neither channels nor samples.
        computed = isinstance(value, Tensor) and value.is_floating_point() and not is_data(value)
        if n.op == 'get_attr' or computed:
            return tree_map_only(Tensor, self._ones, value)
        # What has weights computes new features: the number of each channel starts anew, and samples stay apart.
        if (n.op == 'call_module' and not self._is_free(n)) or kind_of(n) in (Kind.LAYER, Kind.NORM):
            inputs = tensors_in(self.fetch_args_kwargs_from_env(n))
            return tree_map_only(Tensor, lambda out: self._handed_on(out, inputs), self.known[n])
        return super().run_node(n)

    def _is_free(self, node: fx.Node) -> bool:
        """Whether a child has no weights, so that it can run on real numbers, as a pooling does."""
        called = called_module(node, self.module) if isinstance(self.module, nn.Module) else None
        return called is not None and not [*called.parameters(), *called.buffers()]

    def _handed_on(self, out: Tensor, inputs: list[Tensor]) -> Tensor:
        """What a layer returns: its input where the shape stays, else the index anew."""
        same = inputs and inputs[0].shape == out.shape and out.is_floating_point()
        return inputs[0] if same else self._counted(out)

    def _counted(self, like: Tensor) -> Tensor:
        layout = layout_of(like)
        if layout is None or not like.is_floating_point():
            return self._ones(like)
        # Of channels or samples, the one that is not counted repeats itself.
        axis = layout.channel if self.counted == 'channel' else layout.batch
        if axis is None:
            raise RuntimeError(f'the {self.counted} axis of a tensor {tuple(like.shape)} is not known')
        shape = [-1 if at == axis else 1 for at in range(like.ndim)]
        return self._repeated(torch.arange(1, like.shape[axis] + 1, dtype=torch.float32).view(shape), like)

    def _ones(self, like: Tensor) -> Tensor:
        one = torch.ones(()) if like.is_floating_point() else torch.zeros((), dtype=like.dtype)
        return self._repeated(one, like)

    def _repeated(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Numbers in the shape of another tensor, without memory of that size where it can be done without."""
        return numbers.expand(like.shape).clone() if self.in_full else numbers.expand(like.shape)
