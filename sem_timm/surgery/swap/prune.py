"""What of an edited graph still reaches its output: the rest is removed, so that nothing unread is computed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sem_timm.surgery.graphs import ancestors, operation_name
from sem_timm.surgery.tracers import check

_LOOKUPS = {'getattr', 'getitem', 'size', 'dim', 'numel', 'floordiv', 'mul', 'add', 'sub', 'mod', 'eq', 'ne'}
_LOOKUPS |= {'gt', 'ge', 'lt', 'le', 'not_', 'neg', 'int', 'and_', 'or_', 'truediv'}


def prune(graph: fx.Graph) -> None:
    """Removes all nodes that neither reach the output nor change or check what does."""
    alive: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == 'output']
    while waiting:
        alive |= ancestors(waiting)
        waiting = [node for node in graph.nodes if node not in alive and _acts_on(node, alive)]
    for node in reversed(graph.nodes):
        if node not in alive and node.op != 'placeholder':
            graph.erase_node(node)


def _acts_on(node: fx.Node, alive: set[fx.Node]) -> bool:
    """Whether a node that nothing reads changes a tensor that is read, or checks a decision about one."""
    if node.target is check:
        return all(source in alive for source in _computed(node))
    name = operation_name(node)
    in_place = node.op in ('call_method', 'call_function') and name.endswith('_') and not name.endswith('__')
    return (in_place or name in ('setitem', 'copy_')) and node.args[:1] != () and node.args[0] in alive


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
