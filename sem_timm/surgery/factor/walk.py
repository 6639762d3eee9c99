"""Where a constant factor per channel goes: back from a value to the parameters that it may be multiplied into.

Of

    y = self.bn2(self.conv2(x))
    return self.drop_path(y) + shortcut

a factor of ``drop_path(y)`` goes through the drop path, which multiplies by what is the same for all channels, into
weight and bias of ``bn2``; a shift, which drop path passes on in eval mode, into the bias alone. Children are walked
into by their own traces. What reads a value on the way beside what comes next would see the factor as well, and ends
the walk.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from sem_timm.errors import TraceError
from sem_timm.meta.layout import is_learned, layout_of
from sem_timm.meta.vocabulary import Kind, kind_of, operation_name
from sem_timm.surgery.factor.kinds import (
    LAYERS,
    MOVES,
    NORMS,
    NOUNS,
    ON_LAST_AXIS,
    PASSED_LAYERS,
    PLACES,
    POOLING_LAYERS,
    POOLS,
    RECTIFIERS,
    RECTIFYING_LAYERS,
)
from sem_timm.surgery.factor.scope import (
    Multiplied,
    NoPlace,
    Scope,
    Wanted,
    arguments_of,
    before_move,
    called_by,
    first_of,
    given_to,
    in_operand,
    reads,
    where_is,
)
from sem_timm.surgery.graphs import called_module, output_of, read_by
from sem_timm.surgery.reading import Reader, Reading


class Walk:
    """Walks back through the readings of a model; ``through`` gathers the names of the modules that it enters.

    Args:
        reader: Of the model without what multiplies by the factor.
        closed: Modules that are not entered, with the reasons.
    """

    def __init__(self, reader: Reader, closed: dict[str, str]) -> None:
        self.reader = reader
        self.closed = closed
        self.through: dict[str, None] = {}

    def scope(self, name: str, reading: Reading, training: bool, above: Any = None) -> Scope:
        """A scope; parameters and values in it are asked for once it is there."""
        graph = reading.trace.graphs[training]
        return Scope(name, reading, training, above, read_by([output_of(graph)]))

    def value(
        self, scope: Scope, node: Any, axis: int, channels: int, reader: fx.Node | None = None
    ) -> list[Multiplied]:
        """The parameters to multiply for a factor of a node; with ``reader``, if that alone reads the node.

        Raises:
            NoPlace: If there are none.
        """
        wanted = Wanted(axis, 0, channels)
        return self._read(scope, node, wanted, reader) if reader is not None else self._node(scope, node, wanted)

    def output(self, scope: Scope, axis: int, channels: int, first: bool = False) -> list[Multiplied]:
        """The same for what a module returns; with ``first``, the first of several tensors."""
        return self._output(scope, Wanted(axis, 0, channels), (0,) if first else ())

    def _output(self, scope: Scope, wanted: Wanted, path: tuple[int, ...]) -> list[Multiplied]:
        node = output_of(scope.graph)
        returned: Any = node.args[0]
        for place in path:
            if not isinstance(returned, (tuple, list)):
                break
            returned, path = returned[place], path[1:]
        if not isinstance(returned, fx.Node):
            raise NoPlace(f'what {scope.name} returns is not read')
        return self._read(scope, returned, wanted, node, path)

    def _read(
        self, scope: Scope, node: Any, wanted: Wanted, reader: fx.Node, path: tuple[int, ...] = ()
    ) -> list[Multiplied]:
        """A node that must be read by one other alone."""
        if not isinstance(node, fx.Node):
            raise NoPlace(f'a constant is in its place in {where_is(scope)}')
        others = [user for user in node.users if user is not reader and reads(scope, user, node)]
        if path:  # another part of what was returned is nobody's business
            others = [user for user in others if user.target is not operator.getitem]
        if others or sum(entry is node for entry in arguments_of(reader)) > 1:
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} is read by others as well')
        return self._node(scope, node, wanted, path)

    def _node(self, scope: Scope, node: fx.Node, wanted: Wanted, path: tuple[int, ...] = ()) -> list[Multiplied]:
        value = scope.values[node]
        for place in path:
            value = value[place] if isinstance(value, (tuple, list)) else value
        if (
            not isinstance(value, Tensor)
            or not -1 < wanted.axis < value.ndim
            or value.shape[wanted.axis] != wanted.size
        ):
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} has no axis of channels there')
        if node.op == 'placeholder':
            return self._argument(scope, node, wanted)
        if node.op == 'get_attr':
            return [self._parameter(scope, node, wanted)]
        if node.op == 'call_module':
            return self._child(scope, node, wanted, path)
        return self._operation(scope, node, wanted)

    def _argument(self, scope: Scope, node: fx.Node, wanted: Wanted) -> list[Multiplied]:
        above, call = scope.above or self._caller(scope)
        try:
            given = scope.reading.trace.signature.bind(*call.args, **call.kwargs).arguments
        except TypeError as error:
            raise NoPlace(f'how {scope.name} is called is not read') from error
        if str(node.target) not in given:
            raise NoPlace(f'how {scope.name} is called is not read')
        return self._read(above, given[str(node.target)], wanted, call)

    def _caller(self, scope: Scope) -> tuple[Scope, fx.Node]:
        """The scope that calls a module in which a walk began: that of the next module above whose forward does."""
        above, _, target = scope.name.rpartition('.')
        while scope.name:
            if above in self.closed:
                raise NoPlace(self.closed[above])
            try:
                outer = self.scope(above, self.reader.read(above), scope.training)
            except TraceError as error:
                raise NoPlace(f'{above or "the model"} is not read: {error}') from error
            calls = [node for node in outer.graph.nodes if node.op == 'call_module' and node.target == target]
            if len(calls) == 1:
                return outer, calls[0]
            if not above:
                break
            above, _, last = above.rpartition('.')
            target = f'{last}.{target}'
        raise NoPlace('no layer comes before it')

    def _parameter(self, scope: Scope, node: fx.Node, wanted: Wanted) -> Multiplied:
        name = f'{scope.name}.{node.target}' if scope.name else str(node.target)
        held = operator.attrgetter(str(node.target))(self.reader.modules[scope.name])
        if not isinstance(held, nn.Parameter):
            raise NoPlace(f'{name} is no parameter')
        same = [other for other in scope.graph.nodes if other.op == 'get_attr' and other.target == node.target]
        if any(other is not node and other in scope.reached for other in same):
            raise NoPlace(f'{name} is read more than once')
        return self._multiplied(name, wanted, 'layer scale')

    def _multiplied(self, name: str, wanted: Wanted, kind: str) -> Multiplied:
        is_bias = wanted.is_bias and wanted.passes_shifts
        return Multiplied(name, wanted.axis, wanted.kind or kind, wanted.start, wanted.stop, is_bias)

    def _held(self, name: str, wanted: Wanted, keys: Iterable[str], kind: str) -> list[Multiplied]:
        """Weight and bias of a layer."""
        held = {key: replace(wanted, axis=0, is_bias=key == 'bias') for key in keys}
        return [self._multiplied(f'{name}.{key}', one, kind) for key, one in held.items()]

    def _child(self, scope: Scope, node: fx.Node, wanted: Wanted, path: tuple[int, ...]) -> list[Multiplied]:
        called = called_module(node, self.reader.modules[scope.name])
        if called is None:
            raise NoPlace(f'it comes out of the method {node.target} of {where_is(scope)}')
        name = f'{scope.name}.{node.target}' if scope.name else str(node.target)
        if name in self.closed:
            raise NoPlace(self.closed[name])
        count = self.reader.probe.counts.get(name, 0)
        if count != 1 and any(True for _ in called.parameters()):  # without any, as drop path, it may serve several
            raise NoPlace(f'{name} is called {count} times')
        if is_parametrized(called):
            raise NoPlace(f'the weights of {name} are parametrised')
        self.through[name] = None
        if type(called) in PASSED_LAYERS:
            return self._read(scope, first_of(node), wanted, node)
        if type(called) in RECTIFYING_LAYERS or (type(called) in POOLING_LAYERS and wanted.axis == 1):
            return self._read(scope, first_of(node), wanted.without_shifts, node)
        if type(called) in LAYERS:
            return self._layer(scope, node, name, called, wanted)
        try:
            reading = self.reader.read(name)
        except TraceError as error:
            if not called._modules:
                return self.unread_norm(name, called, wanted)
            raise NoPlace(f'{name} is not read: {error}') from error
        return self._output(self.scope(name, reading, scope.training, (scope, node)), wanted, path)

    def _layer(self, scope: Scope, node: fx.Node, name: str, called: Any, wanted: Wanted) -> list[Multiplied]:
        """A layer of torch's own."""
        held = {'weight': called.weight, 'bias': getattr(called, 'bias', None)}
        shape = getattr(called, 'normalized_shape', ())
        axis = scope.values[node].ndim - 1 if type(called) is nn.Linear or shape else 1
        if wanted.axis != axis or len(shape) > 1:
            if type(called) is nn.Linear and held['bias'] is None:  # it mixes something else, such as tokens
                return self._read(scope, first_of(node), wanted.without_shifts, node)
            raise NoPlace(f'{name} works on another axis than the channels')
        kind = LAYERS[type(called)]
        if held['weight'] is None:
            raise NoPlace(f'{name} is a {kind} without weights')
        return self._held(name, wanted, [key for key in held if held[key] is not None], kind)

    def unread_norm(self, name: str, called: nn.Module, wanted: Wanted) -> list[Multiplied]:
        """Weight and bias of a norm of timm's, which asks for autocast and so cannot be traced.

        That it is one, and of these channels, is not known here, but tried in numbers.

        Raises:
            NoPlace: If it has other parameters.
        """
        held = {key: parameter for key, parameter in called._parameters.items() if parameter is not None}
        if not held or held.keys() - {'weight', 'bias'} or any(p.shape != (wanted.size,) for p in held.values()):
            raise NoPlace(f'{name} is not read')
        kind = next((noun for cls, noun in NORMS.items() if isinstance(called, cls)), 'norm')
        return self._held(name, wanted, held, kind)

    def _operation(self, scope: Scope, node: fx.Node, wanted: Wanted) -> list[Multiplied]:
        kind, name = kind_of(node), operation_name(node)
        if node.target is operator.getitem and isinstance(scope.values[first_of(node)], (tuple, list)):
            place = node.args[1]
            if not isinstance(place, int):
                raise NoPlace(f'{called_by(node)} in {where_is(scope)} is not read')
            return self._read(scope, first_of(node), wanted, node, (place,))
        if kind in (Kind.CAST, Kind.COPY, Kind.DROPOUT):
            return self._read(scope, first_of(node), wanted, node)
        if kind is Kind.QUOTIENT or name in RECTIFIERS or (name in POOLS and wanted.axis == 1):
            return self._read(scope, first_of(node), wanted.without_shifts, node)
        if kind in (Kind.SUM, Kind.DIFFERENCE):
            return self._sum(scope, node, wanted if kind is Kind.SUM else wanted.without_shifts)
        if kind is Kind.PRODUCT:
            return self._product(scope, node, wanted)
        if kind in MOVES:
            return self._read(scope, first_of(node), before_move(scope, node, wanted), node)
        if kind is Kind.JOIN and name != 'stack':
            return self._join(scope, node, wanted)
        if name in NOUNS:
            return self._weighted(scope, node, name, wanted)
        raise NoPlace(f'{called_by(node)} in {where_is(scope)} does not pass a factor on')

    def _sum(self, scope: Scope, node: fx.Node, wanted: Wanted) -> list[Multiplied]:
        if node.kwargs.keys() - {'input', 'other'}:
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} is not plainly a sum')
        found: list[Multiplied] = []
        for operand in (*node.args, *node.kwargs.values()):
            if type(operand) in (int, float) and operand == 0:  # what a loop over convolutions begins with
                continue
            moved = in_operand(scope, node, operand, wanted)
            if moved is None:
                raise NoPlace(f'a term of {called_by(node)} in {where_is(scope)} has no channels of its own')
            if not moved.kind and not layout_of(scope.values[operand]):  # type: ignore[index]
                moved = replace(moved, kind='bias', is_bias=True)
            found += self._read(scope, operand, moved, node)
        return found

    def _product(self, scope: Scope, node: fx.Node, wanted: Wanted) -> list[Multiplied]:
        """A factor of a product is one of either operand: of what is learned, if that has a number for each channel."""
        operands = [operand for operand in (*node.args, *node.kwargs.values()) if isinstance(operand, fx.Node)]
        operands.sort(key=lambda operand: not is_learned(scope.values[operand]))
        reason: NoPlace | None = None
        for operand in operands:
            moved = in_operand(scope, node, operand, wanted.without_shifts)
            if moved is not None:
                try:
                    return self._read(scope, operand, moved, node)
                except NoPlace as error:
                    reason = reason or error
        raise reason or NoPlace(f'no operand of {called_by(node)} in {where_is(scope)} has the channels')

    def _join(self, scope: Scope, node: fx.Node, wanted: Wanted) -> list[Multiplied]:
        parts: Any = node.args[0] if node.args else node.kwargs.get('tensors', ())
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get('dim', node.kwargs.get('axis', 0))
        if not isinstance(parts, (tuple, list)) or not isinstance(axis, int):
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} is not read')
        found, start = [], wanted.start
        for part in parts:
            one = wanted.without_shifts  # it would come to some of the positions
            if axis % scope.values[node].ndim == wanted.axis and isinstance(part, fx.Node):
                stop = start + scope.values[part].shape[wanted.axis]
                one, start = replace(wanted, start=start, stop=stop), stop
            found += self._read(scope, part, one, node)
        return found

    def _weighted(self, scope: Scope, node: fx.Node, name: str, wanted: Wanted) -> list[Multiplied]:
        """A linear layer, convolution or norm as a function of its weights, which may be computed themselves."""
        place = PLACES.get(name, 1)
        weight, bias = given_to(node, place, 'weight'), given_to(node, place + 1, 'bias')
        bias = None if name == 'rms_norm' else bias
        shape = given_to(node, 1, 'normalized_shape') if name in ('layer_norm', 'rms_norm') else ()
        several = isinstance(shape, (tuple, list)) and len(shape) > 1
        if wanted.axis != (scope.values[node].ndim - 1 if name in ON_LAST_AXIS else 1) or several:
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} works on another axis than the channels')
        inside = replace(wanted, axis=0, kind=wanted.kind or NOUNS[name], is_bias=False)
        if not isinstance(weight, fx.Node) or scope.values[weight] is None:
            raise NoPlace(f'{called_by(node)} in {where_is(scope)} has no weights')
        found = self._read(scope, weight, inside.without_shifts, node)
        if isinstance(bias, fx.Node) and scope.values[bias] is not None:
            found += self._read(scope, bias, replace(inside, is_bias=True), node)
        return found
