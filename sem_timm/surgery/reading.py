"""What the forwards of a model's modules say: each traced once per structure, evaluated once per shape."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import TraceError, place_of
from sem_timm.meta.probing import Call, Probe, probe
from sem_timm.random_state import preserved_random_state
from sem_timm.surgery.arguments import bind, forward_signature
from sem_timm.surgery.bytecode import may_add
from sem_timm.surgery.evaluate import evaluate
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.residual import ResidualAdd, residual_adds
from sem_timm.surgery.rewrite import edit_of
from sem_timm.surgery.structure import Structures, call_key
from sem_timm.surgery.trace import Trace, is_guided, trace

# While torch.fx traces, it catches the calls of all modules of the process; and the random generators, which a forward
# must not draw from while it is traced, are the process's. So one plan is made at a time.
_PLANNING = RLock()


@contextmanager
def planning() -> Iterator[None]:
    """While nobody else plans, with random numbers and the default device as nobody sees."""
    with _PLANNING, preserved_random_state(on_gpus=False), _on_cpu():
        yield


def _on_cpu() -> AbstractContextManager[object]:
    """Where tensors are made by default, wherever the caller has them made; free where that is so already."""
    # Asked of a tensor: torch.get_default_device does not know of ``with torch.device(...)`` until torch 2.5.
    return nullcontext() if torch.empty(0).device.type == 'cpu' else torch.device('cpu')


@dataclass(frozen=True)
class Reading:
    """A module's forward: its trace, the value of every node, and its residual adds, by training mode."""

    trace: Trace
    values: dict[bool, Values]
    adds: dict[bool, list[ResidualAdd]]


class Reader:
    """Reads modules of a probed model; failures are kept and told again."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.structures = Structures()
        self.modules: dict[str, nn.Module] = dict(probe.skeleton.named_modules())
        self._traces: dict[Hashable, Trace | TraceError] = {}
        self._readings: dict[Hashable, Reading | TraceError] = {}
        self.failures: dict[str, TraceError] = {}
        self._by_name: dict[str, Reading | TraceError] = {}

    def read(self, name: str) -> Reading:
        """Returns the reading of a module that the probe has called; equal ones share theirs.

        Raises:
            TraceError: If its forward cannot be traced or evaluated.
        """
        if name not in self._by_name:
            self._by_name[name] = self._shared(name, None)
        return _or_raise(self._by_name[name])

    def read_with(self, name: str, *, inline_methods: bool) -> Reading:
        """As `read`, with the module's own methods followed or kept as single nodes, whatever sums they hold.

        Functions that have an equivalent are spelled out.

        Raises:
            TraceError: If its forward cannot be traced or evaluated.
        """
        reading = _or_raise(self._shared(name, inline_methods))
        values = bound_arguments(self.modules[name], self.probe.calls[name])
        return replace(reading, trace=replace(reading.trace, values=values))

    def _shared(self, name: str, inline_methods: bool | None) -> Reading | TraceError:
        """The reading of a module, or of one made and called alike; None follows methods where a sum is in them."""
        try:
            values = bound_arguments(self.modules[name], self.probe.calls[name])
            self._check_state(name)
        except TraceError as error:
            return error
        structure = self.structures.describe(self.modules[name])
        key = (structure, call_key(values, shapes=True), _shapes(self.probe.calls[name].output), inline_methods)
        if key not in self._readings:
            try:
                if inline_methods is None:
                    self._readings[key] = self._read(name, values)
                else:
                    self._readings[key] = self._reading(name, values, inline_methods=inline_methods, spell_out=True)
            except TraceError as error:
                self._readings[key] = error
        return self._readings[key]

    def _check_state(self, name: str) -> None:
        """Raises TraceError if the probe has left a module other than it was, so that a trace would begin elsewhere."""
        if name in self.probe.changed:
            cls = type(self.modules[name]).__name__
            raise TraceError(f'{cls}.forward changes self.{self.probe.changed[name]}, which a graph cannot show')

    def holds_residual(self, name: str) -> bool:
        """Whether a module's own forward has a residual add; False where the forward cannot be read."""
        module = self.modules[name]
        if edit_of(module, inherited=True) is not None:
            return True  # it had one, or it was patched as a block without
        if name not in self.probe.calls or not may_add(type(module)):
            return False
        if not any(next(child.parameters(), None) is not None for child in module.children()):
            return False
        try:
            return bool(self.read(name).adds[False])
        except TraceError as error:
            self.failures[name] = error
            return False

    def last_step(self, name: str) -> str:
        """A module's own name; for a sequence that of the step whose output is its own, however deep."""
        module = self.modules[name]
        while type(module).forward is nn.Sequential.forward and module._modules:
            name = f'{name}.{next(reversed(module._modules))}'
            module = self.modules[name]
        return name

    def _read(self, name: str, values: dict[str, Any]) -> Reading:
        reading = self._reading(name, values)
        if not reading.adds[False] and reading.trace.methods:
            # The sum may stand in one of the module's own methods.
            try:
                inlined = self._reading(name, values, inline_methods=True)
            except TraceError:
                return reading
            return inlined if inlined.adds[False] else reading
        return reading

    def _reading(self, name: str, values: dict[str, Any], **how: bool) -> Reading:
        module, call = self.modules[name], self.probe.calls[name]
        cached = self._trace(module, call, values, how)
        try:
            return self._evaluated(replace(cached, values=values), name)
        except TraceError:
            # Perhaps a graph of a module that differs in a number of a child.
            return self._evaluated(trace(module, call, **how), name)

    def _evaluated(self, found: Trace, name: str) -> Reading:
        prefix = f'{name}.' if name else ''
        nodes = [node for graph in found.graphs.values() for node in graph.nodes if node.op == 'call_module']
        calls = {child: self.probe.calls.get(prefix + child) for child in {str(node.target): None for node in nodes}}
        below = {child: call for child, call in calls.items() if call is not None}
        # What children returned that were called just once need not be computed again.
        known = {child: call for child, call in below.items() if self.probe.counts[prefix + child] == 1}
        return _evaluated(found, self.modules[name], self.probe.calls[name], known)

    def _trace(self, module: nn.Module, call: Call, values: dict[str, Any], how: dict[str, bool]) -> Trace:
        structure = self.structures.describe(module)
        shapeless, exact = ((structure, call_key(values, shapes=shapes), *how.items()) for shapes in (False, True))
        found = self._traces.get(shapeless) or self._traces.get(exact)
        if found is None:
            try:
                found = trace(module, call, **how)
            except TraceError as error:
                found = error
            # A value-guided trace holds for the shapes it was made with, and so does a failure of one.
            holds_anywhere = not isinstance(found, TraceError) and not is_guided(found)
            self._traces[shapeless if holds_anywhere else exact] = found
        if isinstance(found, TraceError):
            raise found
        return found


@contextmanager
def reading_of(model: nn.Module, input_size: tuple[int, ...] | None) -> Iterator[Reader]:
    """A reader of a model, for as long as nobody else plans."""
    with planning():
        yield Reader(probe(model, input_size))


def _or_raise(reading: Reading | TraceError) -> Reading:
    if isinstance(reading, TraceError):
        raise reading
    return reading


def bound_arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    """The value of every argument of a recorded call, by parameter name, defaults included.

    Raises:
        TraceError: If the call does not fit the forward of the module's class.
    """
    try:
        return bind(forward_signature(type(module)), call)
    except TypeError as error:
        raise TraceError(f'{type(module).__name__}.forward: {error}') from error


def _evaluated(found: Trace, module: nn.Module, call: Call, known: dict[str, Call]) -> Reading:
    values: dict[bool, Values] = {}
    adds: dict[bool, list[ResidualAdd]] = {}
    for training in (False, True):
        if training and found.graphs[True] is found.graphs[False]:
            values[True], adds[True] = values[False], adds[False]
            continue
        try:
            values[training] = evaluate(found, module, known, training=training)
        except Exception as error:  # a graph that does not run on the traced call's own values is wrong
            raise TraceError(f'{type(module).__name__}: the traced forward does not run: {place_of(error)}') from error
        adds[training] = residual_adds(found.graphs[training], module, values[training])
        output = next(values[training][node] for node in found.graphs[training].nodes if node.op == 'output')
        if _shapes(output) != _shapes(call.output):
            raise TraceError(f'{type(module).__name__}: the traced forward returns other shapes than the forward')
    if len(adds[True]) != len(adds[False]):
        raise TraceError(f'{type(module).__name__}.forward has other residual adds in training than in eval mode')
    return Reading(found, values, adds)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return tuple((key, _shapes(entry)) for key, entry in value.items())
    return tuple(_shapes(entry) for entry in value) if isinstance(value, (tuple, list)) else type(value)
