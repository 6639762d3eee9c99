"""What of an edited graph still reaches its output: the rest is removed, so that nothing unread is computed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.decisions import check
from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.graphs import Values


def prune(graph: fx.Graph, module: nn.Module, values: Values) -> None:
    """Removes all nodes that neither reach the output nor change or check what does.

    Args:
        graph: The graph, changed in place.
        module: The module that it belongs to.
        values: The values of its nodes, as far as they were there before it was edited.
    """
    wanted = [node for node in graph.nodes if node.op == 'output']
    while True:
        alive = needed_for(wanted, module, values)
        checks = [node for node in graph.nodes if node not in alive and node.target is check]
        # A check that a trace left behind is kept where it costs nothing but sizes that are there anyway.
        decided = [node for node in checks if all(source in alive for source in _computed(node, values))]
        if not decided:
            break
        wanted += decided
    # Backwards, so that a node has no users left when its turn comes.
    for node in reversed(graph.nodes):
        if node not in alive and node.op != 'placeholder':
            graph.erase_node(node)


def _computed(node: fx.Node, values: Values) -> Iterator[fx.Node]:
    """What a check depends on beyond shapes of the arguments: layers, parameters and operations on tensors.

    A check of ``x.shape[1] // 7 == 2`` depends on nothing but the argument, one of ``self.pos(x).shape[1]`` on a layer,
    which is not run for the check alone.
    """
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        source = waiting.pop()
        if source in seen or source.op == 'placeholder':
            continue
        seen.add(source)
        if source in values and source.op in ('call_method', 'call_function') and not tensors_in(values[source]):
            waiting += source.all_input_nodes
        else:
            yield source
