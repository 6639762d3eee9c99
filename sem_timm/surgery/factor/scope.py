"""What a walk back to the parameters looks at: modules in one mode, the axis that is wanted, and who reads a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sem_timm.meta.vocabulary import Kind, looks_up, operation_name, word_of, writes_into
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.reading import Reading


class NoPlace(Exception):
    """A factor has nowhere to go; the message says why."""


@dataclass(frozen=True)
class Multiplied:
    """A parameter that a factor is multiplied into.

    Attributes:
        name: Its name in the model.
        axis: Its axis that holds the channels.
        kind: What it is a parameter of, such as 'batch norm'.
        start: The first channel whose factor it takes.
        stop: The one behind the last.
        is_bias: Whether it is added to what the factor is of, so that a shift can go into it as well. Not compared: in
            training drop path passes no shift on, and the places of both modes have to be the same.
    """

    name: str
    axis: int
    kind: str
    start: int
    stop: int
    is_bias: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Scope:
    """One module on the way, in one mode.

    Attributes:
        name: Its name in the model.
        reading: Its reading.
        training: The mode.
        above: The scope that calls it, and the node of the call; None for the one that the walk began in.
    """

    name: str
    reading: Reading
    training: bool
    above: tuple[Scope, fx.Node] | None = None
    reached: set[fx.Node] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """The graph of the mode."""
        return self.reading.trace.graphs[self.training]

    @property
    def values(self) -> Values:
        """The value of each node."""
        return self.reading.values[self.training]


@dataclass(frozen=True)
class Wanted:
    """What is to be multiplied, see `Multiplied`.

    Attributes:
        axis: The axis of channels.
        start: The first channel that is on it.
        stop: The one behind the last.
        kind: What the parameters there are part of.
        is_bias: Whether it is a bias.
        passes_shifts: Whether a number that is added to it is added to what the factor is of, and nothing else changes.
    """

    axis: int
    start: int
    stop: int
    kind: str = ''
    is_bias: bool = False
    passes_shifts: bool = True

    @property
    def without_shifts(self) -> Wanted:
        """The same before a step that passes factors on alone."""
        return replace(self, passes_shifts=False)

    @property
    def size(self) -> int:
        return self.stop - self.start


def where_is(scope: Scope) -> str:
    return scope.name or 'the model'


def called_by(node: fx.Node) -> str:
    return f'the argument {node.target}' if node.op == 'placeholder' else (operation_name(node) or str(node.target))


def first_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def given_to(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def arguments_of(node: fx.Node) -> Iterator[Any]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda entry: found.append(entry))
    return iter(found)


def reads(scope: Scope, user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a node reads its numbers, and it matters."""
    word = word_of(user)
    if looks_up(user) or (word is not None and word.kind is Kind.FILL and first_of(user) is node):
        return False
    if word is not None and word.lends and first_of(user) is not node:
        return False
    return user in scope.reached or writes_into(user) is node


def in_operand(scope: Scope, node: fx.Node, operand: Any, wanted: Wanted) -> Wanted | None:
    """The axis of an operand that is broadcast to the wanted one; None if it has no such axis."""
    given = scope.values[operand] if isinstance(operand, fx.Node) else operand
    if not isinstance(given, Tensor):
        return None
    axis = wanted.axis - (scope.values[node].ndim - given.ndim)
    if axis < 0 or given.shape[axis] != wanted.size:
        return None
    return replace(wanted, axis=axis)


def before_move(scope: Scope, node: fx.Node, wanted: Wanted) -> Wanted:
    """Where the channels were before they were moved: found by moving numbered channels."""
    source = first_of(node)
    given = scope.values.get(source)
    if isinstance(given, Tensor):
        for axis in (axis for axis in range(given.ndim) if given.shape[axis] == wanted.size):
            if torch.equal(*_numbered(scope, node, source, axis, wanted)):
                return replace(wanted, axis=axis)
    raise NoPlace(f'{called_by(node)} in {where_is(scope)} moves channels in a way that is not read')


def _numbered(scope: Scope, node: fx.Node, source: fx.Node, axis: int, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Channels by number on an axis, moved; and what they are if they came to the wanted axis."""
    given = scope.values[source]
    numbers = _along(torch.arange(wanted.size), axis, given.shape)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: numbers if n is source else scope.values[n])
    target: Any = node.target
    try:
        if target is getattr:
            moved = getattr(*args)
        else:
            moved = (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == 'call_method' else target(*args, **kwargs)
            )
        return moved, _along(torch.arange(wanted.size), wanted.axis, moved.shape)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return numbers, numbers + 1


def _along(numbers: Tensor, axis: int, shape: torch.Size) -> Tensor:
    return numbers.view([-1 if place == axis else 1 for place in range(len(shape))]).expand(shape)
