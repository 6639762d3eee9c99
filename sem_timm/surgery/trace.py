"""One module's own forward as a torch.fx graph: children, and where possible its own methods, are leaves.

Tracing one level at a time is what makes every model readable: a block's forward is short and mostly free of control
flow, whatever its children do. Three levels are tried in turn:

1. plain symbolic tracing;
2. with the functions that timm itself marks as not traceable kept as single calls;
3. value-guided: every value is also computed on the meta device, a decision follows that value, and the generated code
   checks at run time that the decision still holds.

A trace never bakes in what may change later. It is made in training and in eval mode; an argument that was None or a
constant is kept symbolic if that gives the same graph, and otherwise guarded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from sem_timm.errors import TraceError, place_of
from sem_timm.meta.probing import Call
from sem_timm.surgery.arguments import bind, conditions, forward_signature, same_tensors
from sem_timm.surgery.bytecode import names_called, switches_in
from sem_timm.surgery.decisions import check, equals
from sem_timm.surgery.equivalents import forward_of
from sem_timm.surgery.tracers import LEVELS, LevelTracer, is_unpacked, own_methods

_CONSTANTS = (type(None), bool, int, float, str)

_Level = Callable[[dict[str, Any], frozenset[str]], LevelTracer]


@dataclass(frozen=True)
class Guard:
    """A condition on an argument that the traced code relies on, as source code."""

    condition: str

    @staticmethod
    def that_equals(name: str, value: Any) -> Guard:
        """An argument is None, or a constant, as it was."""
        return Guard(f'{name} is None' if value is None else f'{equals.__name__}({name}, {value!r})')


@dataclass(frozen=True)
class Trace:
    """The forward of one module.

    Attributes:
        signature: The signature of the forward, without ``self``.
        values: Argument values of the traced call, by how its code names them, defaults included.
        graphs: The graph in training and in eval mode; the same object twice where they agree.
        guards: What the call must satisfy for the graphs to hold.
        methods: Names of the module's own methods that the graphs call like children.
        level: Which of `LEVELS` made it; empty for a graph that was not traced.
        edits: What was made of the graphs so far, by what was asked for.
    """

    signature: inspect.Signature
    values: dict[str, Any]
    graphs: dict[bool, fx.Graph]
    guards: tuple[Guard, ...]
    methods: frozenset[str]
    level: str = ''
    edits: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)


def trace(module: nn.Module, call: Call, *, inline_methods: bool = False, spell_out: bool = False) -> Trace:
    """Traces the forward of ``module``, a module of a weightless copy, as it was called in ``call``.

    Args:
        module: The module; attributes that its forward fills in as a side effect may change.
        call: A call of the module on meta tensors.
        inline_methods: Follow calls of the module's own methods instead of keeping each as one node.
        spell_out: Follow equivalents of functions, which may round differently, and take arguments that are one tensor
            for one.

    Raises:
        TraceError: If no level can trace it; the message names the line that stopped the last one.
    """
    signature = forward_signature(type(module))
    if hasattr(forward_of(type(module)), '__wrapped__'):
        raise TraceError(f'{type(module).__name__}.forward is decorated, which a graph cannot show.')
    switches = switches_in(module)
    if switches:
        raise TraceError(f'{type(module).__name__}.forward uses {min(switches)}, which a graph cannot show.')
    values = bind(signature, call)
    form = [*conditions(type(module), values)]
    form += [f'{name} is {other}' for name, other in same_tensors(values).items()] if spell_out else []
    methods: frozenset[str] = frozenset() if inline_methods else frozenset(own_methods(type(module)))
    failure: Exception | None = None
    for name, level in LEVELS.items():
        tracers = partial(level, methods=methods, spell_out=spell_out)
        try:
            graphs, guards = _both_modes(module, values, signature, tracers)
            return Trace(signature, values, graphs, (*map(Guard, form), *guards), methods, name)
        except Exception as error:  # whatever the foreign forward raises on a proxy means: this level cannot
            failure = error
    assert failure is not None
    raise TraceError(f'{type(module).__name__}.forward cannot be traced: {place_of(failure)}') from failure


def is_guided(trace: Trace) -> bool:
    """Whether the trace took decisions that depend on the values of the traced call."""
    return any(node.target is check for graph in trace.graphs.values() for node in graph.nodes)


def _both_modes(
    module: nn.Module, values: dict[str, Any], signature: inspect.Signature, level: _Level
) -> tuple[dict[bool, fx.Graph], tuple[Guard, ...]]:
    mentioned = names_called(type(module))
    with _training_flag(module) as flag:
        graph, guards = _with_free_arguments(module, values, signature, level)
        if not flag.was_read and 'training' not in mentioned:
            return {True: graph, False: graph}, tuple(guards)
        flag.value = True
        with _children_in_training(module):
            other, more = _with_free_arguments(module, values, signature, level)
    if listing(other) == listing(graph):
        other = graph
    return {True: other, False: graph}, tuple(dict.fromkeys([*guards, *more]))


@contextmanager
def _children_in_training(module: nn.Module) -> Iterator[None]:
    """A forward may read the flag of a child; the children themselves are not run."""
    children = [child for child in module.modules() if child is not module]
    for child in children:
        child.__dict__['training'] = True
    try:
        yield
    finally:
        for child in children:
            child.__dict__['training'] = False


class _TrainingFlag:
    value = False
    was_read = False


@contextmanager
def _training_flag(module: nn.Module) -> Iterator[_TrainingFlag]:
    """Makes the module's own training flag settable, and tells whether its forward reads it."""
    flag = _TrainingFlag()

    def read(self: nn.Module) -> bool:
        flag.was_read = True
        return flag.value

    cls: Any = type(module)
    flagged = type(cls)(cls.__name__, (cls,), {'training': property(read), '__module__': cls.__module__})
    flagged.forward = forward_of(cls)  # fx reads the forward that it finds in the class
    module.__class__ = flagged
    try:
        yield flag
    finally:
        module.__class__ = cls


def _with_free_arguments(
    module: nn.Module, values: dict[str, Any], signature: inspect.Signature, level: _Level
) -> tuple[fx.Graph, list[Guard]]:
    """Traces with as many arguments symbolic as change nothing, and guards for the others."""
    constants = [n for n, value in values.items() if isinstance(value, _CONSTANTS) and type(value) is not int]
    given = [name for name in values if name not in constants]
    # Tensors are symbolic; None and constants are at first what they were in the call.
    symbolic = frozenset(given)
    graph = level(values, symbolic).run(module)
    unpacked = [(name, len(values[name])) for name in given if is_unpacked(values[name])]
    guards = [Guard(f'isinstance({name}, tuple) and len({name}) == {length}') for name, length in unpacked]
    # All at once first: most forwards only pass such arguments on.
    for names in [constants, *([name] for name in constants)] if constants else []:
        if set(names) <= symbolic:
            continue
        try:
            freer = level(values, symbolic | set(names)).run(module)
        except Exception:  # such an argument decides something, so it stays as it was called
            freer = None
        if freer is not None and listing(freer, {name: values[name] for name in names}) == listing(graph):
            graph, symbolic = freer, symbolic | set(names)
    for name in constants:
        if name not in symbolic:
            guards.append(Guard.that_equals(name, values[name]))
    for name in given:
        parameter = signature.parameters.get(name)  # of what has no name none is optional
        if (
            parameter is not None
            and parameter.default is None
            and not _indifferent(module, values, symbolic, name, graph, level)
        ):
            guards.append(Guard(f'{name} is not None'))
    return graph, guards


def _indifferent(
    module: nn.Module, values: dict[str, Any], symbolic: frozenset[str], name: str, graph: fx.Graph, level: _Level
) -> bool:
    """Whether the forward does the same if an optional argument that was given is None."""
    try:
        without = level({**values, name: None}, symbolic - {name}).run(module)
    except Exception:
        return False
    return listing(without) == listing(graph, {name: None})


def listing(graph: fx.Graph, constants: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """A graph as plain data that compares equal for equal graphs; ``constants`` take the place of placeholders."""
    constants = constants or {}
    # Nodes by their places, since names say in which order they were made.
    place = {node: f'%{index}' for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == 'placeholder' and node.target in constants:
            place[node] = constants[node.target]
    return [
        (node.op, node.target, repr(map_arg(node.args, place.get)), repr(map_arg(node.kwargs, place.get)))
        for node in graph.nodes
    ]
