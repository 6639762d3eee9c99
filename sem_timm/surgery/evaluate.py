"""Values of every node of a traced graph, computed on the meta device with layouts carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.trace import Trace


class _Recorder(fx.Interpreter):
    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        called: Any = self.module
        for part in str(target).split('.'):
            called = getattr(called, part)
        return called(*args, **kwargs)


def evaluate(trace: Trace, module: nn.Module, *, training: bool = False) -> dict[fx.Node, Any]:
    """Runs a graph on the values of its traced call, children in eval mode, and returns the value of each node."""
    graph = trace.graphs[training]
    recorder = _Recorder(module, garbage_collect_values=False, graph=graph)
    names = [str(node.target) for node in graph.nodes if node.op == 'placeholder']
    with torch.no_grad(), LayoutMode():
        recorder.run(*(trace.values[name] for name in names), enable_io_processing=False)
    return dict(recorder.env)
