"""What of an edited graph still reaches its output: the rest is removed, so that nothing unread is computed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.graphs import operation_name
from sem_timm.surgery.tracers import check

_LOOKUPS = {'getattr', 'getitem', 'size', 'dim', 'numel', 'floordiv', 'mul', 'add', 'sub', 'mod', 'eq', 'ne'}
_LOOKUPS |= {'gt', 'ge', 'lt', 'le', 'not_', 'neg', 'int', 'and_', 'or_', 'truediv'}


def prune(graph: fx.Graph, module: nn.Module) -> None:
    """Removes all nodes that neither reach the output nor change or check what does."""
    wanted = [node for node in graph.nodes if node.op == 'output']
    while True:
        alive = needed_for(wanted, module)
        checks = [node for node in graph.nodes if node not in alive and node.target is check]
        decided = [node for node in checks if all(source in alive for source in _computed(node))]
        if not decided:
            break
        wanted += decided
    for node in reversed(graph.nodes):
        if node not in alive and node.op != 'placeholder':
            graph.erase_node(node)


def _computed(node: fx.Node) -> Iterator[fx.Node]:
    """What a check depends on beyond shapes of the arguments: layers, parameters and operations on tensors."""
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        source = waiting.pop()
        if source in seen or source.op == 'placeholder':
            continue
        seen.add(source)
        if source.op in ('call_method', 'call_function') and operation_name(source) in _LOOKUPS:
            waiting += source.all_input_nodes
        else:
            yield source
