"""Sites for an inserted module, and the edits that put it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import TraceError
from sem_timm.meta.layout import Layout, layout_of
from sem_timm.surgery.aliasing import Memory, tensors_in
from sem_timm.surgery.arguments import forward_signature
from sem_timm.surgery.blocks import find_blocks
from sem_timm.surgery.bytecode import iterates_children
from sem_timm.surgery.cases import run_other_case
from sem_timm.surgery.equivalents import encoder_layer, forward_of
from sem_timm.surgery.graphs import descendants
from sem_timm.surgery.placement import (
    Placement,
    Rehearsal,
    check_editable,
    check_methods,
    compiled,
    free_names,
    written,
)
from sem_timm.surgery.proof import prove_insertion, prove_output
from sem_timm.surgery.reading import Reader, Reading
from sem_timm.surgery.residual import ResidualAdd, last_of_each_output, site_layout
from sem_timm.surgery.rewrite import Edit
from sem_timm.surgery.sites import Insertion, Refused, Site
from sem_timm.surgery.source import output_source
from sem_timm.surgery.trial import shape_text, try_insertion


class Inserter:
    """Places the insertion of one operation in the blocks of one probed model."""

    noun = 'blocks'

    def __init__(self, reader: Reader, operation: Insertion) -> None:
        self.reader = reader
        self.operation = operation

    @cached_property
    def candidates(self) -> list[str]:
        """Names of the blocks."""
        return find_blocks(self.reader)

    def place(self, name: str) -> Placement:
        """Finds the sites of one module.

        Raises:
            Refused: If it cannot take the operation.
        """
        check_editable(self.reader, name)
        if forward_of(type(self.reader.modules[name.rpartition('.')[0]])) is encoder_layer:
            raise Refused('in inference its parent, a TransformerEncoderLayer, computes it without calling it')
        reading = self._residual_reading(name)
        if reading is not None:
            return self._at_residual(name, reading)
        # A new child of a sequence would become one of its steps; its last step returns the same.
        last = self.reader.last_step(name)
        check_editable(self.reader, last)
        return self._at_output(last)

    def prove(self, name: str, placement: Placement) -> None:
        """Compares the edited forward with the original in numbers; raises TraceError if they differ."""
        module = self.reader.modules[name]
        if placement.reading is None:
            prove_output(module, self.reader.probe.calls[name], placement.edit)
        else:
            prove_insertion(placement.reading, module, placement.edit)

    def unreadable(self) -> dict[str, str]:
        """Modules that might be blocks and could not be read, unless they are part of one or hold some."""

        def related(name: str) -> bool:
            return any(f'{name}.'.startswith(f'{block}.') or block.startswith(f'{name}.') for block in self.candidates)

        return {name: str(error) for name, error in self.reader.failures.items() if name and not related(name)}

    def rehearse(self, placements: dict[str, Placement]) -> Rehearsal:
        """Nothing changes around an insertion."""
        return Rehearsal()

    def _residual_reading(self, name: str) -> Reading | None:
        """The reading to edit, or None if the module is to be treated as a whole."""
        if self.operation.position == 'output' or not self.reader.modules[name]._modules:
            if self.operation.position == 'residual':
                raise Refused('it has no residual branch: it has no children')
            return None
        try:
            reading = self.reader.read(name)
        except TraceError as error:
            if self.operation.position == 'residual':
                raise Refused(str(error)) from error
            return None
        if last_of_each_output(reading.trace.graphs[False], reading.adds[False]):
            return reading
        if self.operation.position == 'residual':
            raise Refused("its own forward has no residual add; position='output' would gate what it returns")
        return None

    def _at_output(self, name: str) -> Placement:
        module, output = self.reader.modules[name], self.reader.probe.calls[name].output
        if iterates_children(type(module)):
            raise Refused('its forward goes through its children, and the new one would become one of them')
        # Of several results the first is the trunk; the others are what blocks hand on to each other.
        kind = type(output) if type(output) in (tuple, list) else Tensor
        tensor = output[0] if kind is not Tensor and output else output
        if not isinstance(tensor, Tensor):
            raise Refused(f'it returns a {type(output).__name__}, not a tensor')
        if self._others_hold(tensor, name):
            raise Refused('it returns a tensor that it is given, or one twice; who changes the one changes the other')
        (attribute,) = free_names(module, self.operation.attribute)
        site = self._site(name, 'output', attribute, tensor, layout_of(tensor))
        source, bindings = output_source(type(module), forward_signature(type(module)), attribute, kind)
        edit = compiled(Edit(type(module), source, bindings, (attribute,), 'output', self.operation))
        return Placement((site,), edit, None)

    def _others_hold(self, returned: Tensor, name: str) -> bool:
        """Whether what a module returns is a tensor that it is given, or returns twice, and that others may read."""
        module, call = self.reader.modules[name], self.reader.probe.calls[name]
        held = sum(returned is leaf for leaf in tree_leaves((call.args, call.kwargs, call.output)))
        if held == 1 or getattr(module, 'inplace', False):  # what such a module is given nobody reads afterwards
            return False
        return call.output is not returned or bool(module._modules) or not self._alone_is_given(name)

    def _alone_is_given(self, name: str) -> bool:
        """Whether nobody but a module sees the tensor that it is given.

        Of ``x = F.batch_norm(x, ...); x = self.drop(x); x = self.act(x)`` the drop does, an identity.
        """
        above, _, target = name.rpartition('.')
        try:
            reading = self.reader.read(above)
        except TraceError:
            return False
        for training, graph in reading.trace.graphs.items():
            memory = Memory(reading.values[training])
            calls = [node for node in graph.nodes if node.op == 'call_module' and node.target == target]
            if len(calls) != 1 or len(calls[0].all_input_nodes) != 1:
                return False
            (given,) = calls[0].all_input_nodes
            elsewhere = set(graph.nodes) - descendants(calls[0]) - {given}
            if given.op == 'placeholder' or set(given.users) != {calls[0]}:
                return False
            if any(memory.shared(given, other) for other in elsewhere):
                return False
        return True

    def _at_residual(self, name: str, reading: Reading) -> Placement:
        module, graph = self.reader.modules[name], reading.trace.graphs[False]
        adds = reading.adds[False]
        check_methods(module, graph)
        chosen = last_of_each_output(graph, adds) if self.operation.branches == 'last' else adds
        numbers = [adds.index(add) for add in chosen]
        attributes = free_names(module, self.operation.attribute, len(numbers))
        sites = []
        for number, attribute in zip(numbers, attributes):
            add = adds[number]
            tensor = reading.values[False][add.branch]
            layout = site_layout(add, reading.values[False])
            sites.append(self._site(name, 'residual', attribute, tensor, layout))
        # Which sums are residual depends on shapes, which the trace does not.
        in_mode = {mode: tuple(reading.adds[mode][number] for number in numbers) for mode in (False, True)}
        edits, key = reading.trace.edits, (self.operation, attributes, *in_mode.values())
        if key not in edits:
            graphs = self._edited(reading.trace.graphs, in_mode, attributes)
            edits[key] = written(
                type(module), reading.trace, graphs, other_case, attributes, 'residual', self.operation
            )
        return Placement(tuple(sites), edits[key], reading)

    def _edited(
        self, graphs: dict[bool, fx.Graph], adds: dict[bool, tuple[ResidualAdd, ...]], attributes: tuple[str, ...]
    ) -> dict[bool, fx.Graph]:
        modes = (False,) if graphs[True] is graphs[False] else (False, True)
        fuses = self.operation.fuses_shortcut
        edited = {mode: insert_modules(graphs[mode], adds[mode], attributes, fuses) for mode in modes}
        return {True: edited[False], **edited}

    def _site(self, name: str, position: str, attribute: str, tensor: Tensor, layout: Layout | None) -> Site:
        shape = tuple(tensor.shape)
        text = shape_text(shape)
        if not tensor.is_floating_point():
            raise Refused(f'the tensor there is of {tensor.dtype}, which has no gradient')
        if tensor.ndim < 3:
            raise Refused(f'there are no positions to pool over: the tensor is {text}')
        if layout is None or layout.channel is None:
            raise Refused(f'the channels of the {text} tensor could not be told from its other axes')
        if layout.channel not in (1, tensor.ndim - 1):
            raise Refused(f'the channels of the {text} tensor are on axis {layout.channel}, not first or last')
        if layout.batch != 0:
            raise Refused(f'the batch is not the first axis of the {text} tensor, and gates are per sample')
        # Prefix tokens are those of (B, N, C); in another layout the second axis holds something else.
        prefix = layout.prefix if tensor.ndim == 3 and layout.channel == 2 else 0
        if prefix >= shape[1] or (tensor.ndim == 3 and layout.channel == 2 and shape[1] == 1):
            raise Refused(f'there are no positions to pool over: {text} holds nothing but class tokens')
        channel_dim = 1 if layout.channel == 1 else -1
        class_name = type(self.reader.modules[name]).__name__
        images = tensors_in(self.reader.probe.calls[''].args)[0]
        channels, windows = shape[layout.channel], max(1, shape[0] // images.shape[0])
        site = Site(name, class_name, position, attribute, shape, tensor.dtype, channels, channel_dim, prefix, windows)
        return replace(site, num_parameters=try_insertion(self.operation, site))


def other_case(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the patched forward of a module for a call that decides otherwise than the one that was planned for."""
    return run_other_case(module, args, kwargs, Inserter)


def insert_modules(graph: fx.Graph, adds: Sequence[ResidualAdd], attributes: tuple[str, ...], fuse: bool) -> fx.Graph:
    """A copy of ``graph`` with a call of a new child on the branch of each given add.

    With ``fuse`` the child gets the shortcut as well and the add is left to it.
    """
    copies: dict[fx.Node, fx.Node] = {}
    edited = fx.Graph()
    edited.output(edited.graph_copy(graph, copies))
    for add, attribute in zip(adds, attributes):
        node, branch, shortcut = copies[add.add], copies[add.branch], copies[add.shortcut]
        if fuse and not add.partial:
            # Where the two lie differently in memory, the first operand of the sum decides how the result does.
            order: dict[str, Any] = {'shortcut_first': True} if node.all_input_nodes[0] is shortcut else {}
            with edited.inserting_before(node):
                new = edited.call_module(attribute, (branch, shortcut), order)
            node.replace_all_uses_with(new)
            edited.erase_node(node)
            copies = {old: new if copy is node else copy for old, copy in copies.items()}
            continue
        with edited.inserting_after(branch) if add.partial else edited.inserting_before(node):
            new = edited.call_module(attribute, (branch,))
        if add.partial:
            # What reads the branch beside the sum, such as the rest of RexNet's channels, reads the gated one as well.
            for user in [user for user in branch.users if user is not new]:
                user.replace_input_with(branch, new)
        else:
            node.replace_input_with(branch, new)
    return edited
