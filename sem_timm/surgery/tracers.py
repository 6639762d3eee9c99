"""The tracers behind `sem_timm.surgery.trace`: one for plain and wrapped tracing, one guided by values."""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from sem_timm.compat import REFUSING_PROXIES, buffers_take_proxies, get_notrace_functions
from sem_timm.errors import TraceError, is_between, line_of
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.state import State
from sem_timm.meta.vocabulary import DEVICE_QUESTIONS, MAKERS
from sem_timm.random_state import random_states
from sem_timm.surgery.arguments import forward_signature, passed, same_tensors
from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.decisions import NO_TENSOR, check
from sem_timm.surgery.equivalents import equivalent_of
from sem_timm.surgery.graphs import ancestors


def own_methods(cls: type) -> Iterator[str]:
    """Names of the plain methods that a module class defines beyond those of ``nn.Module``, forward excepted."""
    for base in cls.__mro__:
        if base in (nn.Module, nn.Sequential):
            return
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and name != 'forward' and not hasattr(nn.Module, name):
                yield name


class LevelTracer(fx.Tracer):
    """Traces the root's own forward with the arguments in ``symbolic`` as proxies and the others as they are.

    Modules that other threads call in the meantime do what they always do.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        values: dict[str, Any],
        symbolic: frozenset[str],
        methods: frozenset[str] = frozenset(),
        autowrap: tuple[Any, ...] = (),
        spell_out: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=(*autowrap, *REFUSING_PROXIES))
        if REFUSING_PROXIES:
            self._autowrap_search.append(torch)  # where they are called, as torch.cat
        self.values = values
        self.symbolic = symbolic
        self.methods = methods
        self.spell_out = spell_out
        self.same = same_tensors(values) if spell_out else {}
        self.mode = _mode()
        self.thread = get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # fx would rename concrete arguments and assert on them; here each keeps its name, whatever its value.
        given: dict[str, Any] = {}
        for name, value in self.values.items():
            proxy: Any = self.create_proxy('placeholder', name, (), {})
            if is_unpacked(value):
                proxy = tuple(proxy[index] for index in range(len(value)))  # a forward may ask whether it is one
            given[name] = given[self.same[name]] if name in self.same else proxy if name in self.symbolic else value
        args, kwargs = passed(forward_signature(type(self.root)), given)
        return (lambda root, *_: root_fn(root, *args, **kwargs)), [self.root]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        spelled_out = equivalent_of(target) if self.spell_out and kind == 'call_function' else None
        made = NotImplemented if spelled_out is None else spelled_out(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named) if made is NotImplemented else made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _mode() != self.mode:
            raise TraceError('the forward switches gradients or autocast on or off, which a graph cannot show')
        node = super().create_node(*args, **kwargs)
        if node.op not in ('placeholder', 'output'):
            node.meta['place'] = _place(sys._getframe(1))
        return node

    def run(self, module: nn.Module) -> fx.Graph:
        """Traces a module; calling one of its own methods in ``methods`` records a node, as calling a child does."""
        leaves = {name: self._leaf(name) for name in self.methods if name not in module.__dict__}
        module.__dict__.update(leaves)
        # A traced forward may fill caches with proxies or count itself: all of it is taken back.
        state, drawn = State(module), random_states()
        try:
            with self._makers_recorded(module), buffers_take_proxies():
                graph = self.trace(module)
        finally:
            added, changed = state.added(), [*state.rebound(), *state.changed(_is_memory)]
            state.restore()
            for name in leaves:
                del module.__dict__[name]
        if drawn != random_states():
            raise TraceError('the forward draws random numbers to decide what to do')
        if changed:
            raise TraceError(f'the forward changes self.{changed[0]}, which a graph cannot show')
        if any(node.op == 'get_attr' and node.target in added for node in graph.nodes):
            raise TraceError('the forward makes a constant tensor')
        _drop_dead_reads(graph)
        return graph

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._is_recorded() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_recorded() else attr_val

    @contextmanager
    def _makers_recorded(self, module: nn.Module) -> Iterator[None]:
        """Lets functions of torch that make tensors of sizes be nodes; left alone, they take no traced sizes."""
        makers = {name: getattr(torch, name) for name in names_called(type(module)) & MAKERS}

        def recorded(make: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                # A type of floats that is known is asked now; a tensor would be a constant of the graph.
                is_asked = isinstance(make, type) and not any(isinstance(each, fx.Proxy) for each in args)
                if is_asked or not self._is_recorded():
                    return make(*args, **kwargs)
                return self.create_proxy('call_function', make, args, kwargs)

            return call

        for name, make in makers.items():
            setattr(torch, name, recorded(make))
        try:
            yield
        finally:
            for name, make in makers.items():
                setattr(torch, name, make)

    def _is_recorded(self) -> bool:
        """Whether what happens now is part of the traced forward."""
        return get_ident() == self.thread

    def _leaf(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.create_proxy('call_module', name, args, kwargs)


class _GuidedProxy(fx.Proxy):
    """A proxy that answers questions about its value from the meta run, and leaves a check of each answer behind."""

    def __len__(self) -> int:
        return self.tracer.decide(self, len)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return self.tracer.decide(self, int)  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        return self.tracer.decide(self, float)  # type: ignore[attr-defined]


class _GuidedTracer(LevelTracer):
    """Computes every node on the meta device as it is recorded, and lets control flow follow the values."""

    def __init__(self, values: dict[str, Any], symbolic: frozenset[str], **how: Any) -> None:
        super().__init__(values, symbolic, autowrap=tuple(get_notrace_functions()), **how)
        self.known: dict[fx.Node, Any] = {}
        self.computing = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _GuidedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self.computing = True
        try:
            with torch.no_grad(), LayoutMode():
                value = self.known[proxy.node] = self._compute(proxy.node)
                proxy.node.meta[NO_TENSOR] = not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
        finally:
            self.computing = False
        return proxy

    def _known(self, node: fx.Node) -> Any:
        # A tensor that the forward made by itself is an attribute of the root, until the trace is over.
        return self.known[node] if node in self.known else getattr(self.root, str(node.target))

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self._known)
        if node.op == 'placeholder':
            return self.values[str(node.target)]
        if node.op == 'call_function':
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == 'call_method':
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        root = self.root
        assert isinstance(root, nn.Module)
        if node.op == 'call_module' and str(node.target) in own_methods(type(root)):
            state = State(root)
            try:
                return getattr(type(root), str(node.target))(root, *args, **kwargs)
            finally:
                state.restore()  # the method is called in the rewritten forward as well
        found: Any = root
        for part in str(node.target).split('.'):
            found = getattr(found, part)
        return found.forward(*args, **kwargs) if node.op == 'call_module' else found

    def _is_recorded(self) -> bool:
        return super()._is_recorded() and not self.computing

    def decide(self, proxy: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        value = self.known[proxy.node]
        # A shape may be another in the next call, and is checked; numbers in a tensor are never the same.
        if isinstance(value, torch.Tensor) and question is not len:
            raise TraceError('the forward depends on values of a tensor')
        if _asks_for_device(proxy.node):
            raise TraceError('the forward depends on the device of a tensor')
        answer = question(value)
        where = line_of(traceback.extract_stack())
        self.create_node('call_function', check, (proxy.node, answer, where), {})
        return answer

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        entries: Any = obj
        return iter([entries[i] for i in range(self.decide(obj, len))])


def _with_notrace_functions(values: dict[str, Any], symbolic: frozenset[str], **how: Any) -> LevelTracer:
    return LevelTracer(values, symbolic, autowrap=tuple(get_notrace_functions()), **how)


# By what is said of a module that was traced so.
LEVELS: dict[str, Callable[..., LevelTracer]] = {
    'plainly': LevelTracer,
    "with timm's notrace functions kept whole": _with_notrace_functions,
    'guided by values': _GuidedTracer,
}


def is_unpacked(value: Any) -> bool:
    """Whether an argument is handed on as a tuple of proxies: a forward may ask if it is one, and what is in it."""
    return type(value) is tuple and any(isinstance(entry, torch.Tensor) for entry in value)


def _place(frame: Any) -> tuple[str, int] | None:
    """File and line of the traced statement that a frame works for; None where the traced forward is torch's own."""
    while is_between(frame.f_code.co_filename):
        if frame.f_code is LevelTracer.run.__code__:
            return None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _mode() -> tuple[bool, ...]:
    autocast = tuple(torch.is_autocast_enabled(device) for device in ('cpu', 'cuda'))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _is_memory(value: Any) -> bool:
    """Whether a traced value is computed from weights alone, so that remembering it changes no result."""
    return isinstance(value, fx.Proxy) and all(node.op != 'placeholder' for node in ancestors([value.node]))


def _asks_for_device(node: fx.Node) -> bool:
    asked = (node, *node.all_input_nodes)
    return any(each.target is getattr and each.args[1] in DEVICE_QUESTIONS for each in asked)


def _drop_dead_reads(graph: fx.Graph) -> None:
    """Removes reads that nobody uses: sizes unpacked and not needed, parameters looked at and not touched."""
    for node in reversed(graph.nodes):
        reads = node.op == 'get_attr' or (node.op == 'call_function' and node.target in (getattr, operator.getitem))
        if reads and not node.users:
            graph.erase_node(node)
