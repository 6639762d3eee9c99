"""What of an edited graph still reaches its output: the rest is removed, so that nothing unread is computed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from sem_timm.surgery.tracers import check

_LOOKUPS = {'getattr', 'getitem', 'size', 'dim', 'numel', 'floordiv', 'mul', 'add', 'sub', 'mod', 'eq', 'ne'}
_LOOKUPS |= {'gt', 'ge', 'lt', 'le', 'not_', 'neg', 'int', 'and_', 'or_', 'truediv'}


def prune(graph: fx.Graph) -> None:
    """Removes all nodes that neither reach the output nor change or check what does."""
    alive: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == 'output']
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in alive:
                alive.add(node)
                waiting += node.all_input_nodes
        waiting = [node for node in graph.nodes if node not in alive and _acts_on(node, alive)]
    for node in reversed(graph.nodes):
        if node not in alive and node.op != 'placeholder':
            graph.erase_node(node)


def _acts_on(node: fx.Node, alive: set[fx.Node]) -> bool:
    """Whether a node that nothing reads changes a tensor that is read, or checks a decision about one."""
    if node.target is check:
        return all(source in alive for source in _computed(node))
    name = str(node.target) if node.op == 'call_method' else getattr(node.target, '__name__', '')
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
        name = str(source.target) if source.op == 'call_method' else getattr(source.target, '__name__', '')
        if source.op in ('call_method', 'call_function') and name in _LOOKUPS:
            waiting += source.all_input_nodes
        else:
            yield source


def read_targets(graph: fx.Graph, module: nn.Module) -> set[str]:
    """Names of the parameters of a module that a graph reads, those of the children it calls included."""
    called = [str(node.target) for node in graph.nodes if node.op in ('call_module', 'get_attr')]
    return {
        name
        for name, _ in module.named_parameters(remove_duplicate=False)
        if any(name == target or name.startswith(f'{target}.') for target in called)
    }
