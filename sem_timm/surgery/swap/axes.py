"""Which axes of a tensor inside a forward hold channels, and which hold samples of the batch.

Shapes cannot tell the head axis from the token axis, nor tokens from channels. So a part of the graph is run on real
numbers that are an index: every layer hands on its input, or the number of each output channel (or sample), and all
that moves data does so as always. An axis along which the result varies holds what was counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.surgery.evaluate import run_needed
from sem_timm.surgery.graphs import Values, called_module
from sem_timm.surgery.layout import layout_of

Counted = Literal['channel', 'batch']

_LAYERS = {'linear', 'conv1d', 'conv2d', 'conv3d'}
_NORMS = {'normalize', 'layer_norm', 'rms_norm', 'group_norm', 'batch_norm', 'l2_normalize'}


def changes_along_axes(node: fx.Node, module: nn.Module, values: Values, counted: Counted) -> list[int]:
    """How often a node's value changes along each of its axes when channels, or samples, are counted.

    Raises:
        RuntimeError: If the part of the graph before the node does not run on index numbers.
    """
    result = run_on_indices([node], module, values, counted)[node]
    changes = ((result.diff(dim=axis) != 0).movedim(axis, 0).flatten(1).any(1) for axis in range(result.ndim))
    return [int(change.sum()) for change in changes]


def run_on_indices(
    nodes: Iterable[fx.Node], module: nn.Module, values: Values, counted: Counted
) -> dict[fx.Node, Tensor]:
    """The values of nodes when every layer returns the index of each channel or sample instead of features."""
    wanted = list(nodes)
    return run_needed(_Indices(module, wanted[0].graph, values, counted), wanted)


class _Indices(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, values: Values, counted: Counted) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.known, self.counted = values, counted

    def run_node(self, n: fx.Node) -> Any:
        if n.op == 'placeholder':
            return tree_map_only(Tensor, self._counted, self.known[n])
        if n.op == 'get_attr':
            return tree_map_only(Tensor, _ones, self.known[n])
        name = getattr(n.target, '__name__', '')
        if (n.op == 'call_module' and not self._is_free(n)) or (n.op == 'call_function' and name in _LAYERS | _NORMS):
            inputs = [leaf for leaf in tree_leaves(self.fetch_args_kwargs_from_env(n)) if isinstance(leaf, Tensor)]
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
            return _ones(like)
        axis = layout.channel if self.counted == 'channel' else layout.batch
        if axis is None:
            raise RuntimeError(f'the {self.counted} axis of a tensor {tuple(like.shape)} is not known')
        shape = [-1 if at == axis else 1 for at in range(like.ndim)]
        return torch.arange(1, like.shape[axis] + 1, dtype=torch.float32).view(shape).expand(like.shape).clone()


def _ones(like: Tensor) -> Tensor:
    return torch.ones(like.shape) if like.is_floating_point() else torch.zeros(like.shape, dtype=like.dtype)
