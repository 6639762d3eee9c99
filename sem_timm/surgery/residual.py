"""Residual adds in a traced graph, found by data flow.

A residual add has two tensor operands of equal shape. One, the shortcut, is data that the layers left alone, or a
projection of it; the other, the branch, went through layers that the shortcut did not. Not every such sum is one:
sums of parallel convolutions, attention biases and position encodings have no untouched side, no common data, or do
not reach the output as a whole. For example, of

    y = self.bn2(self.conv2(self.act(self.conv1(x))))
    return self.act2(y + self.downsample(x))

the sum is one: ``y`` is the branch, with two layers of weights, and the projection, with one, is the shortcut.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.meta.layout import Layout, layout_of
from sem_timm.meta.vocabulary import NORM_LAYERS, Kind, kind_of, operation_name, writes_into
from sem_timm.surgery.effects import is_written_after
from sem_timm.surgery.graphs import Values, Verdict, ancestors, is_data, output_of, read_by


@dataclass(frozen=True)
class ResidualAdd:
    """One residual add.

    Attributes:
        add: The node of the sum.
        branch: The operand that went through the layers; where the sum takes only a slice of it, the whole tensor.
        shortcut: The other operand.
        partial: Whether the sum takes only a slice of the branch.
    """

    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    partial: bool


def residual_adds(graph: fx.Graph, module: nn.Module, values: Values) -> list[ResidualAdd]:
    """The residual adds of a graph whose results carry the module's output, in the order they are executed."""
    return [verdict.found for verdict in judged_sums(graph, module, values) if verdict.found is not None]


def judged_sums(graph: fx.Graph, module: nn.Module, values: Values) -> Iterator[Verdict[ResidualAdd]]:
    """What became of every sum of a graph, in the order they are executed.

    Args:
        graph: The graph.
        module: The module that it belongs to.
        values: The value of every node.
    """
    weights = _WeightCounter(module)
    sizes = {value.numel() for value in tree_leaves(values[output_of(graph)]) if isinstance(value, Tensor)}
    reached = read_by([output_of(graph)])
    for node in graph.nodes:
        if kind_of(node) is Kind.SUM:
            judged = _residual(node, weights, values, sizes) if node in reached else 'it does not reach the output'
            yield Verdict(node, reason=judged) if isinstance(judged, str) else Verdict(node, judged)


def _residual(node: fx.Node, weights: _WeightCounter, values: Values, sizes: set[int]) -> ResidualAdd | str:
    """The residual add that a sum is, or the reason why it is none; ``sizes`` are those of the output's tensors."""
    operands = _operands(node)
    if operands is None:
        return 'it is not plainly the sum of two values'
    pair = _unequal(values, node, *operands) or _branch_and_shortcut(*operands, weights, values)
    if isinstance(pair, str):
        return pair
    # RexNet adds its shortcut to some channels of the branch: the gate goes on all of them.
    branch, shortcut = pair
    whole = _before_slices(branch, values)
    if any(_changed_in_place(operand, node) for operand in {branch, shortcut, whole}):
        return 'an operand is changed in place'
    if is_written_after(node, branch, weights.module, values):  # which the new module keeps for its gradient
        return 'its branch is written into afterwards'
    if sizes & {values[node].numel(), values[whole].numel()} or _rejoined(node, operands, values):
        return ResidualAdd(node, whole, shortcut, whole is not branch)
    return 'it does not reach the output as a whole'


def last_of_each_output(graph: fx.Graph, adds: list[ResidualAdd]) -> list[ResidualAdd]:
    """Of several residual adds in a row only the last; one for each tensor the forward returns."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    kept: dict[fx.Node, ResidualAdd] = {}
    for result in output_of(graph).all_input_nodes:
        reached = ancestors([result])
        before = [add for add in adds if add.add in reached]
        if before:
            last = max(before, key=lambda add: order[add.add])
            kept[last.add] = last
    return sorted(kept.values(), key=lambda add: order[add.add])


def site_layout(add: ResidualAdd, values: Values) -> Layout | None:
    """Layout of a branch; where branch and shortcut disagree, that of the shortcut, which is the trunk's."""
    own, trunk = layout_of(values[add.branch]), layout_of(values[add.shortcut])
    if own is None or trunk is None or add.partial:
        return own or trunk
    channel = own.channel if trunk.channel is None else trunk.channel
    return Layout(channel, max(own.prefix, trunk.prefix), trunk.batch)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands if the node is a plain sum of two nodes."""
    if kind_of(node) is not Kind.SUM or node.kwargs.keys() - {'input', 'other'}:
        return None
    operands = [*node.args, *node.kwargs.values()]
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    first, second = operands
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


def _unequal(values: Values, add: fx.Node, first: fx.Node, second: fx.Node) -> str:
    """Why the operands of a sum are not two tensors of equal shape with data; empty where they are."""
    tensors = [values[node] for node in (add, first, second)]
    if not all(isinstance(tensor, Tensor) and layout_of(tensor) is not None for tensor in tensors):
        return "its operands are not both tensors computed from the module's input"
    if first is second:
        return 'its operands are one and the same'
    return '' if tensors[0].shape == tensors[1].shape == tensors[2].shape else 'its operands are of unequal shape'


def _branch_and_shortcut(
    first: fx.Node, second: fx.Node, weights: _WeightCounter, values: Values
) -> tuple[fx.Node, fx.Node] | str:
    """Tells the branch from the shortcut, or why this is some other sum."""
    if _is_one_of_several_inputs(first, values) or _is_one_of_several_inputs(second, values):
        return 'it fuses tensors of a list that the module is given'
    # What both operands are computed from; the layers behind it are what tells the two apart.
    common = ancestors([first], values) & ancestors([second], values)
    depth_first, touched_first = weights.along(first, common)
    depth_second, touched_second = weights.along(second, common)
    # A sum that the data enters untouched is the trunk so far, whatever else went into it.
    carries_first, carries_second = (_carries(node, common, weights, values) for node in (first, second))
    if carries_first != carries_second and (touched_second if carries_first else touched_first):
        return (second, first) if carries_first else (first, second)
    if not touched_first and touched_second:
        return second, first
    if not touched_second and touched_first:
        return first, second
    # Neither side is untouched: a projection shortcut, if it holds weights and the other side clearly more of them.
    if depth_first > depth_second >= 1:
        return first, second
    if depth_second > depth_first >= 1:
        return second, first
    if not common:
        return 'its operands have no data in common'
    if not touched_first and not touched_second:
        return 'neither operand went through layers that the other did not'
    return f'neither operand is untouched: they went through {depth_first} and {depth_second} layers of weights'


def _carries(node: fx.Node, common: set[fx.Node], weights: _WeightCounter, values: Values) -> bool:
    """Whether common data reaches a node through sums and mere changes of shape."""
    if node in common:
        return True
    sources = [source for source in node.all_input_nodes if is_data(values[source])]
    if _operands(node) is not None:
        return any(_carries(source, common, weights, values) for source in sources)
    if len(sources) != 1 or weights.own(node) != (0, False) or not isinstance(values[sources[0]], Tensor):
        return False
    same = isinstance(values[node], Tensor) and values[node].numel() == values[sources[0]].numel()
    return same and _carries(sources[0], common, weights, values)


def _changed_in_place(operand: fx.Node, add: fx.Node) -> bool:
    """Whether a statement changes an operand in place, so that it matters when it is read, or which tensor it is."""
    changing = [user for user in operand.users if user.op != 'call_module' and writes_into(user) is operand]
    return any(user is not add or len(operand.users) > 1 for user in changing)


def _is_one_of_several_inputs(node: fx.Node, values: Values) -> bool:
    """Whether a node is an entry of a list of tensors handed to the module: summing those is fusion (DLA's roots)."""
    if node.op != 'call_function' or node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0].op == 'placeholder' and isinstance(values[node.args[0]], list)


def _before_slices(node: fx.Node, values: Values) -> fx.Node:
    """The tensor that a chain of slices starts from (RexNet adds its shortcut to a part of the channels)."""
    while _is_slice(node):
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(values[source], Tensor):
            break
        node = source
    return node


def _is_slice(node: fx.Node) -> bool:
    return node.op == 'call_function' and operation_name(node) in ('getitem', 'narrow')


def _rejoined(add: fx.Node, operands: tuple[fx.Node, fx.Node], values: Values) -> bool:
    """Whether the output joins the sum with the rest of a tensor of which an operand is a slice (DPN's dual paths)."""
    # DPN adds to one part of its channels and concatenates the other.
    result = output_of(add.graph).args[0]
    if not isinstance(result, fx.Node) or kind_of(result) is not Kind.JOIN or add not in result.all_input_nodes:
        return False
    wholes = {_before_slices(operand, values) for operand in operands} - set(operands)
    return any(_is_slice(part) and part.args[0] in wholes for part in result.all_input_nodes)


class _WeightCounter:
    """How many weight layers lie on the longest way from common data to an operand."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def along(self, node: fx.Node, common: set[fx.Node]) -> tuple[int, bool]:
        """Returns the number of weight layers, and whether anything learned but a scale was passed at all."""
        passed: dict[fx.Node, tuple[int, bool]] = dict.fromkeys(common, (0, False))
        reached = ancestors([node])
        for current in node.graph.nodes:
            if current in reached and current not in passed:
                before = [passed[source] for source in current.all_input_nodes]
                own, learned = self.own(current)
                depth = max((depth for depth, _ in before), default=0) + own
                passed[current] = depth, learned or any(touched for _, touched in before)
            if current is node:
                break
        return passed[node]

    def own(self, node: fx.Node) -> tuple[int, bool]:
        """The same for one node alone."""
        if node.op == 'get_attr':
            value = operator.attrgetter(str(node.target))(self.module)
            return int(isinstance(value, nn.Parameter) and value.ndim > 1), isinstance(value, nn.Parameter)
        if node.op != 'call_module':
            return 0, False
        called = operator.attrgetter(str(node.target))(self.module)
        if not isinstance(called, nn.Module):  # one of the module's own methods: assume it does the work
            return 1, True
        parameters = list(called.parameters())
        weights = sum(p.ndim > 1 for p in parameters)
        # A learned scale leaves a shortcut one; a norm does not (RepVGG sums a norm with convolutions).
        scales = not called._modules and not weights and not isinstance(called, NORM_LAYERS)
        return weights, bool(parameters) and not scales
