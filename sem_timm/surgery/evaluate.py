"""Values of the nodes of a traced graph: on the meta device with layouts carried along, or in numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.trace import Trace


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, known: Mapping[str, Any]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.known = known

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.known:
            return self.known[target]
        called: Any = self.module
        for part in str(target).split('.'):
            called = getattr(called, part)
        return called(*args, **kwargs)


def evaluate(
    trace: Trace, module: nn.Module, known: Mapping[str, Any], *, training: bool = False
) -> dict[fx.Node, Any]:
    """Runs a graph on the values of its traced call, children in eval mode.

    Args:
        trace: The trace.
        module: The module it was made from, or one that traces the same.
        known: Outputs of children that need not be run again, by their names in the module.
        training: Which of the graphs.

    Returns:
        The value of each node.
    """
    graph = trace.graphs[training]
    names = [str(node.target) for node in graph.nodes if node.op == 'placeholder']
    recorder = _Recorder(module, graph, known)
    with torch.no_grad(), LayoutMode():
        recorder.run(*(trace.values[name] for name in names), enable_io_processing=False)
    return dict(recorder.env)


class _Partial(_Recorder):
    def __init__(self, module: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
        super().__init__(module, graph, {})
        self.arguments = arguments

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target)]


def values_of(
    graph: fx.Graph,
    module: nn.Module,
    arguments: Mapping[str, Any],
    nodes: list[fx.Node],
    at_first: Collection[fx.Node] = (),
) -> dict[fx.Node, Any]:
    """Runs as much of a graph as some of its nodes need, without gradients, and returns their values.

    Values are those at the end, if others write into them; for the nodes ``at_first`` they are copies of the first.
    """
    return run_needed(_Partial(module, graph, arguments), nodes, at_first)


def run_needed(runner: fx.Interpreter, nodes: list[fx.Node], at_first: Collection[fx.Node] = ()) -> dict[fx.Node, Any]:
    """Lets an interpreter run what some nodes need and nothing else, and returns their values as `values_of` does."""
    needed = needed_for(nodes, runner.module)
    copies = {}
    with torch.no_grad():
        for node in nodes[0].graph.nodes:
            if node in needed:
                runner.env[node] = runner.run_node(node)
                if node in at_first:
                    copies[node] = tree_map_only(torch.Tensor, torch.clone, runner.env[node])
    return {node: copies.get(node, runner.env[node]) for node in nodes}


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of what a module returns."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
