"""Decisions that a forward takes by sizes: checked where they were traced, or asked before anything is computed.

A value-guided trace of

    if x.shape[1] % 7:
        x = pad(x)
    return x + self.attn(x)

knows one answer and leaves a check of it behind. Where the question needs nothing but the sizes of arguments, as here,
it is asked at the beginning; where it needs what a child returns, the check stays where it is.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import has_side_effect

from sem_timm.errors import GuardError
from sem_timm.surgery.graphs import ancestors

# The function beside a generated forward that tells whether a call is of the case that was read.
FITS = '_fits'


# Marks a node of a trace whose value is a number, a shape or the like, and no tensor.
NO_TENSOR = 'no_tensor'


@has_side_effect
def check(value: Any, expected: Any, where: str) -> None:
    """Run-time check of one decision that a value-guided trace took: ``value`` still answers as it did then.

    Raises:
        GuardError: If it does not.
    """
    if not answers(value, expected):
        met = f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)[:80]
        raise GuardError(
            f'the patched forward was planned for {expected!r} and met {met} at {where}.\n'
            '  Compiled or exported, it has the case that it was planned for alone: unpatch_model(model), '
            'patch_model(model, ..., input_size=(C, H, W)).'
        )


def answers(value: Any, expected: Any) -> bool:
    """Whether a value still answers a question of a trace as it did then: as a truth, a number, or a length."""
    kind = len if isinstance(value, (tuple, list, Tensor)) and type(expected) is int else type(expected)
    return bool(kind(value) == expected)


def equals(value: Any, expected: Any) -> bool:
    """Whether an argument is the constant that it was; where `torch.fx` traces the whole model, its graph checks it."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy('call_function', check, (value, expected, value.node.name), {})
        return True
    return bool(value == expected)


def divide(graph: fx.Graph) -> tuple[fx.Graph, fx.Graph]:
    """Graphs of the checks that need arguments alone, with what they need, and of all that is left."""
    first, after = fx.Graph(), fx.Graph()
    checks = [node for node in graph.nodes if node.target is check]
    if not checks:
        return first, graph
    sizes = _of_arguments(graph)
    early = {node for node in checks if node.args[0] in sizes}
    # A forward may ask the same more than once.
    asked = ancestors({node.args[:2]: node for node in reversed(checks) if node in early}.values())
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in asked or node.op == 'placeholder':
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(None)
    copies = {}
    after.output(after.graph_copy(graph, copies))
    for node in reversed([*graph.nodes]):
        if node in early or (node in asked and node.op != 'placeholder' and not copies[node].users):
            after.erase_node(copies[node])
    return first, after


def _of_arguments(graph: fx.Graph) -> set[fx.Node]:
    """Arguments, what is in them where they are tuples, their sizes, and what is computed of numbers alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        looked_up = node.op in ('call_function', 'call_method') and set(node.all_input_nodes) <= found
        if node.op == 'placeholder' or (looked_up and (node.target is operator.getitem or node.meta.get(NO_TENSOR))):
            found.add(node)
    return found
