"""What nodes of a graph need: what they are computed from, and what writes into that in place on the way.

For example, of

    y = self.conv(x)
    y.mul_(2)            # nobody uses what this returns
    return y + x

the sum needs the second line as well, since its operand is read after it was written into.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from sem_timm.meta.vocabulary import looks_up, writes_into
from sem_timm.surgery.aliasing import Memory
from sem_timm.surgery.graphs import Values, ancestors, called_module


def needed_for(nodes: Iterable[fx.Node], module: nn.Module, values: Values) -> set[fx.Node]:
    """The nodes that some nodes are computed from, those included that write into what is read of it afterwards.

    Args:
        nodes: The nodes, all of one graph.
        module: The module that the graph belongs to.
        values: The values of the graph's nodes, which tell what shares memory; new nodes may be missing.
    """
    wanted = list(nodes)
    order = {node: position for position, node in enumerate(wanted[0].graph.nodes)}
    writes = writes_in(order, module)
    # Without writes beside it, what a node is computed from is all that it needs.
    found = ancestors(wanted)
    if not writes.keys() - found:
        return found
    memory = Memory(values)
    # What a graph writes into an argument, a parameter or a buffer is seen by others than the graph.
    outside = [node for node in order if node.op in ('placeholder', 'get_attr')]
    while True:
        reads = [
            (order[node], source)
            for node in found
            if _reads(node, writes, memory, module)
            for source in node.all_input_nodes
        ]
        reads += [(len(order), node) for node in wanted]
        missing = [
            node
            for node, target in writes.items()
            if node not in found
            and (
                any(memory.shared(target, other) for other in outside)
                or any(at > order[node] and memory.shared(source, target) for at, source in reads)
            )
        ]
        # What a missing write is computed from may read memory that others write into: look again.
        if not missing:
            return found
        found |= ancestors(missing)


def is_written_after(node: fx.Node, operand: fx.Node, module: nn.Module, values: Values) -> bool:
    """Whether a later statement writes into an operand of a node, under whatever name, other than the node itself.

    Args:
        node: The node.
        operand: One of its operands.
        module: The module that the graph belongs to.
        values: The values of the graph's nodes.
    """
    order = {each: position for position, each in enumerate(node.graph.nodes)}
    later = [target for write, target in writes_in(order, module).items() if order[write] > order[node]]
    memory = Memory(values)
    return any(memory.shared(target, operand) for target in later)


def writes_in(nodes: Iterable[fx.Node], module: nn.Module) -> dict[fx.Node, fx.Node]:
    """The nodes that write in place, each with the node whose data it overwrites."""
    found = {}
    for node in nodes:
        target = writes_into(node, called_module(node, module) if node.op == 'call_module' else None)
        if target is not None:
            found[node] = target
    return found


def _reads(node: fx.Node, writes: dict[fx.Node, fx.Node], memory: Memory, module: nn.Module) -> bool:
    """Whether a node reads numbers of its operands; a view does not, and who reads the view does."""
    if node in writes:
        return True
    called = called_module(node, module) if node.op == 'call_module' else None
    return not (looks_up(node) or memory.is_view(node, called))
