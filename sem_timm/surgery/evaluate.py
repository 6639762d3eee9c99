"""Values of the nodes of a traced graph: on the meta device with layouts carried along, or in numbers."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from sem_timm.meta.layout_mode import AnsweringMode
from sem_timm.meta.probing import Call
from sem_timm.surgery.aliasing import linked, passed_on, passed_on_in_either_mode
from sem_timm.surgery.bytecode import may_write
from sem_timm.surgery.effects import writes_in
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.trace import Trace


class _Recorder(fx.Interpreter):
    """Runs a graph; children that need not be run again return what they returned in the probe."""

    def __init__(self, module: nn.Module, graph: fx.Graph, known: Mapping[str, Call]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.known = known
        # Where nothing is written in place it does not matter whose memory a tensor is. A trace shows x += y as a sum.
        self.writes = may_write(type(module)) or bool(writes_in(graph.nodes, module))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        called = operator.attrgetter(str(target))(self.module)
        # What a child returned in the probe is shown again, in the memory of what it is given now.
        if target in self.known:
            call = self.known[target]
            output = linked(call.output, passed_on(call), args, kwargs)
        else:
            output = called(*args, **kwargs)
        if not self.writes:
            return output
        passing = passed_on_in_either_mode(called, Call(args, kwargs, output))
        return linked(output, passing, args, kwargs)


def evaluate(trace: Trace, module: nn.Module, known: Mapping[str, Call], *, training: bool = False) -> Values:
    """Runs a graph on the values of its traced call, children in eval mode.

    Args:
        trace: The trace.
        module: The module it was made from, or one that traces the same.
        known: Calls of children that need not be run again, by their names in the module.
        training: Which of the graphs.

    Returns:
        The value of each node. Where a child returns what it is given, be it in training only, so do the values.
    """
    graph = trace.graphs[training]
    names = [str(node.target) for node in graph.nodes if node.op == 'placeholder']
    # On the meta device a run costs no arithmetic, so all nodes are run, those that nothing reads included.
    recorder = _Recorder(module, graph, known)
    with torch.no_grad(), AnsweringMode(False):
        recorder.run(*(trace.values[name] for name in names), enable_io_processing=False)
    return dict(recorder.env)


class Partial(fx.Interpreter):
    """Runs a part of a graph on arguments by name."""

    def __init__(self, module: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.arguments = arguments

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target)]


def run_part(
    runner: fx.Interpreter, nodes: Collection[fx.Node], part: Collection[fx.Node], at_first: Collection[fx.Node] = ()
) -> Values:
    """Lets an interpreter run a part of its graph and nothing else, without gradients.

    Args:
        runner: The interpreter.
        nodes: The nodes whose values are wanted.
        part: All that they need, see `needed_for`.
        at_first: Those whose values are copies of the first ones; the others are as they are at the end, when others
            may have written into them.

    Returns:
        The values of the nodes.
    """
    copies = {}
    with torch.no_grad():
        for node in runner.graph.nodes:
            if node in part:
                runner.env[node] = runner.run_node(node)
                if node in at_first:
                    copies[node] = tree_map_only(torch.Tensor, torch.clone, runner.env[node])
    return {node: copies.get(node, runner.env[node]) for node in nodes}
