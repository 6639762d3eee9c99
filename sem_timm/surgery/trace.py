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
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from timm.layers import get_notrace_functions
from torch import fx, nn
from torch.fx.node import map_arg

from sem_timm.errors import GuardError, TraceError
from sem_timm.surgery.skeleton import Call

_CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Guard:
    """A condition on an argument that the traced code relies on, as source code."""

    condition: str


@dataclass(frozen=True)
class Trace:
    """The forward of one module.

    Attributes:
        signature: The signature of the forward, without ``self``.
        values: Argument values of the traced call, by parameter name, defaults included.
        graphs: The graph in training and in eval mode; the same object twice where they agree.
        guards: What the call must satisfy for the graphs to hold.
        methods: Names of the module's own methods that the graphs call like children.
    """

    signature: inspect.Signature
    values: dict[str, Any]
    graphs: dict[bool, fx.Graph]
    guards: tuple[Guard, ...]
    methods: frozenset[str]


def trace(module: nn.Module, call: Call, *, inline_methods: bool = False) -> Trace:
    """Traces the forward of ``module``, a module of a weightless copy, as it was called in ``call``.

    Args:
        module: The module; attributes that its forward fills in as a side effect may change.
        call: A call of the module on meta tensors.
        inline_methods: Follow calls of the module's own methods instead of keeping each as one node.

    Raises:
        TraceError: If no level can trace it; the message names the line that stopped the last one.
    """
    signature = forward_signature(type(module))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
        raise TraceError(f'{type(module).__name__}.forward{signature} takes a variable number of arguments.')
    values = bind(signature, call)
    methods = frozenset() if inline_methods else frozenset(own_methods(type(module)))
    failure: Exception | None = None
    for level in (_plain, _with_notrace_functions, _value_guided):
        try:
            with _leaf_methods(module, methods):
                graphs, guards = _both_modes(module, values, signature, level)
            return Trace(signature, values, graphs, guards, methods)
        except GuardError:
            raise
        except Exception as error:  # whatever the foreign forward raises on a proxy means: this level cannot
            failure = error
    assert failure is not None
    raise TraceError(f'{type(module).__name__}.forward cannot be traced: {_place(failure, module)}') from failure


def is_guided(trace: Trace) -> bool:
    """Whether the trace took decisions that depend on the values of the traced call."""
    return any(node.target is check for graph in trace.graphs.values() for node in graph.nodes)


def forward_signature(cls: type) -> inspect.Signature:
    """The signature of a module class's forward, without ``self`` and as written (annotations not evaluated)."""
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def bind(signature: inspect.Signature, call: Call) -> dict[str, Any]:
    bound = signature.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def own_methods(cls: type) -> Iterator[str]:
    """Names of the plain methods that a module class defines beyond those of ``nn.Module``, forward excepted."""
    for base in cls.__mro__:
        if base in (nn.Module, nn.Sequential):
            return
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and name != 'forward' and not hasattr(nn.Module, name):
                yield name


@contextmanager
def _leaf_methods(module: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """While active, calling one of the module's own methods records a node, as calling a child does."""
    tracers = _ACTIVE
    added = [name for name in names if name not in module.__dict__]

    def leaf(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: tracers[-1].create_proxy('call_module', name, args, kwargs)

    module.__dict__.update({name: leaf(name) for name in added})
    try:
        yield
    finally:
        for name in added:
            del module.__dict__[name]


_ACTIVE: list[_LevelTracer] = []  # the tracer at work, for the methods that stand in for a module's own


class _LevelTracer(fx.Tracer):
    """Traces the root's own forward with the arguments in ``symbolic`` as proxies and the others as they are."""

    proxy_buffer_attributes = True

    def __init__(self, values: dict[str, Any], symbolic: frozenset[str], autowrap: tuple[Any, ...] = ()) -> None:
        super().__init__(autowrap_functions=autowrap)
        self.values = values
        self.symbolic = symbolic

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # fx would rename concrete arguments and assert on them; here each keeps its name, whatever its value.
        given = {}
        for name, value in self.values.items():
            proxy = self.create_proxy('placeholder', name, (), {})
            if type(value) is tuple and any(isinstance(entry, torch.Tensor) for entry in value):
                proxy = tuple(proxy[index] for index in range(len(value)))  # a forward may ask whether it is one
            given[name] = proxy if name in self.symbolic else value
        return (lambda root, *_: root_fn(root, **given)), [self.root]

    def run(self, module: nn.Module) -> fx.Graph:
        _ACTIVE.append(self)
        try:
            graph = self.trace(module)
        finally:
            _ACTIVE.pop()
        _drop_dead_reads(graph)
        return graph


class _GuidedProxy(fx.Proxy):
    """A proxy that answers questions about its value from the meta run, and leaves a check of each answer behind."""

    def __len__(self) -> int:
        return self.tracer.decide(self, len)  # type: ignore[attr-defined, no-any-return]

    def __index__(self) -> int:
        return self.tracer.decide(self, int)  # type: ignore[attr-defined, no-any-return]

    __int__ = __index__

    def __float__(self) -> float:
        return self.tracer.decide(self, float)  # type: ignore[attr-defined, no-any-return]


class _GuidedTracer(_LevelTracer):
    """Computes every node on the meta device as it is recorded, and lets control flow follow the values."""

    def __init__(self, values: dict[str, Any], symbolic: frozenset[str]) -> None:
        super().__init__(values, symbolic, tuple(get_notrace_functions()))
        self.known: dict[fx.Node, Any] = {}
        self.computing = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _GuidedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self.computing = True
        try:
            with torch.no_grad():
                self.known[proxy.node] = self._compute(proxy.node)
        finally:
            self.computing = False
        return proxy

    def _compute(self, node: fx.Node) -> Any:
        args = map_arg(node.args, lambda n: self.known[n])
        kwargs = map_arg(node.kwargs, lambda n: self.known[n])
        if node.op == 'placeholder':
            return self.values[str(node.target)]
        if node.op == 'call_function':
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == 'call_method':
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        root = self.root
        assert isinstance(root, nn.Module)
        if node.op == 'call_module' and node.target in own_methods(type(root)):
            return getattr(type(root), str(node.target))(root, *args, **kwargs)
        found: Any = root
        for part in str(node.target).split('.'):
            found = getattr(found, part)
        return found.forward(*args, **kwargs) if node.op == 'call_module' else found

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def decide(self, proxy: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        value = self.known[proxy.node]
        if isinstance(value, torch.Tensor) and question is not len:
            raise TraceError('the forward depends on values of a tensor')
        answer = question(value)
        where = _line_of(traceback.extract_stack())
        self.create_node('call_function', check, (proxy.node, answer, where), {})
        return answer

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.known[obj.node]
        length = value.shape[0] if isinstance(value, torch.Tensor) else len(value)
        return iter([obj[i] for i in range(length)])


def check(value: Any, expected: Any, where: str) -> None:
    """Run-time check of one decision that a value-guided trace took: ``value`` still answers as it did then.

    Raises:
        GuardError: If it does not.
    """
    kind = len if isinstance(value, (tuple, list)) and not isinstance(expected, bool) else type(expected)
    if kind(value) != expected:
        raise GuardError(
            f'the patched forward was planned for {expected!r} and met {value!r} at {where}.\n'
            '  Undo the patch and plan again for this input: plan_model(model, ..., input_size=(C, H, W)).'
        )


_Level = Callable[[dict[str, Any], frozenset[str]], _LevelTracer]


def _plain(values: dict[str, Any], symbolic: frozenset[str]) -> _LevelTracer:
    return _LevelTracer(values, symbolic)


def _with_notrace_functions(values: dict[str, Any], symbolic: frozenset[str]) -> _LevelTracer:
    return _LevelTracer(values, symbolic, tuple(get_notrace_functions()))


def _value_guided(values: dict[str, Any], symbolic: frozenset[str]) -> _LevelTracer:
    return _GuidedTracer(values, symbolic)


def _both_modes(
    module: nn.Module, values: dict[str, Any], signature: inspect.Signature, level: _Level
) -> tuple[dict[bool, fx.Graph], tuple[Guard, ...]]:
    with _training_flag(module) as flag:
        graph, guards = _with_free_arguments(module, values, signature, level)
        if not flag.was_read:
            return {True: graph, False: graph}, tuple(guards)
        flag.value = True
        other, more = _with_free_arguments(module, values, signature, level)
    if listing(other) == listing(graph):
        other = graph
    return {True: other, False: graph}, tuple(dict.fromkeys([*guards, *more]))


class _TrainingFlag:
    value = False
    was_read = False


@contextmanager
def _training_flag(module: nn.Module) -> Iterator[_TrainingFlag]:
    """Makes the module's own training flag settable, and tells whether its forward reads it.

    Children keep theirs: they are not run, and their mode is their own affair.
    """
    flag = _TrainingFlag()

    def read(self: nn.Module) -> bool:
        flag.was_read = True
        return flag.value

    cls = type(module)
    module.__class__ = type(cls)(cls.__name__, (cls,), {'training': property(read), '__module__': cls.__module__})
    try:
        yield flag
    finally:
        module.__class__ = cls


def _with_free_arguments(
    module: nn.Module, values: dict[str, Any], signature: inspect.Signature, level: _Level
) -> tuple[fx.Graph, list[Guard]]:
    """Traces with as many arguments symbolic as change nothing, and guards for the others."""
    constants = [n for n, value in values.items() if isinstance(value, _CONSTANTS) and type(value) is not int]
    given = frozenset(values) - frozenset(constants)
    graph, symbolic = level(values, given).run(module), given
    guards = []
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
            guards.append(Guard(f'{name} is None' if values[name] is None else f'{name} == {values[name]!r}'))
    for name in given:
        if signature.parameters[name].default is None and not _indifferent(module, values, symbolic, name, graph, level):
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
    place = {node: f'%{index}' for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == 'placeholder' and node.target in constants:
            place[node] = constants[node.target]
    return [
        (node.op, node.target, repr(map_arg(node.args, place.get)), repr(map_arg(node.kwargs, place.get)))
        for node in graph.nodes
    ]


def _drop_dead_reads(graph: fx.Graph) -> None:
    """Removes reads that nobody uses: sizes unpacked and not needed, parameters looked at and not touched."""
    for node in reversed(graph.nodes):
        reads = node.op == 'get_attr' or (node.op == 'call_function' and node.target in (getattr, operator.getitem))
        if reads and not node.users:
            graph.erase_node(node)





def _place(error: Exception, module: nn.Module) -> str:
    """An error of a trace with the line of the module's own code that caused it."""
    where = _line_of(traceback.extract_tb(error.__traceback__))
    text = str(error).split('\n', 1)[0]
    return f'{text} ({where})' if where else text


def _line_of(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if '/torch/' not in frame.filename and '/sem_timm/surgery/' not in frame.filename and frame.line:
            # From the package on: the code is shown to people, and the place of site-packages is nobody's business.
            return f'{frame.filename.rsplit("site-packages/", 1)[-1]}:{frame.lineno}: {frame.line}'
    return ''
