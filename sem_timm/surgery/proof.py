"""A rewritten forward against the original, in numbers, before it is used.

Both run on real tensors of the traced shapes, in the mode that the graph is for, with stand-ins for the children and
for methods that were kept whole. So

    return self.act(self.drop(y) + x)                     # the module's own forward
    return self.act(self.sem(self.drop(y), x))            # rewritten

must return the same numbers where ``sem`` is an identity, and leave the same behind: in arguments, in the tensors that
are read, in the random generators, and in what children were given. Where attention is swapped, the new core hands on
what the old one returned, and what it is given must be the old queries, keys and values, with the old scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from sem_timm.errors import TraceError, from_package
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.probing import Call
from sem_timm.meta.state import outline, plain
from sem_timm.meta.vocabulary import PASSING_LAYERS, Kind, kind_of
from sem_timm.random_state import preserved_random_state, random_states
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.arguments import forward_signature, passed
from sem_timm.surgery.bytecode import names_called, surroundings
from sem_timm.surgery.effects import needed_for
from sem_timm.surgery.evaluate import Partial, run_part
from sem_timm.surgery.graphs import Values, output_of
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.replay import replayed
from sem_timm.surgery.rewrite import Edit, patched_class
from sem_timm.surgery.stand_in import StandIns, cloned, shell_of

if TYPE_CHECKING:
    from sem_timm.surgery.swap.cores import Core

# Fewer rows in a matrix product change the order of its sums, and a scale moved to the queries that of its products.
SWAP_TOLERANCE, NARROW_TOLERANCE = 1e-4, 5e-2


def prove_insertion(reading: Reading, module: nn.Module, edit: Edit) -> None:
    """Compares the rewritten forward with that of the module's own class, in both modes where they differ.

    Raises:
        TraceError: If they compute different things, or one of them cannot be run by itself.
    """
    graphs = reading.trace.graphs
    # Code that asks for the mode may stand where no trace went, such as behind a constant argument.
    both = graphs[True] is not graphs[False] or 'training' in names_called(type(module))
    for training in (False, True) if both else (False,):
        with _explained(module):
            proof = _Proof(StandIns(reading, module, training))
            old = proof.run(edit.base, {})
            new = proof.run(patched_class(edit), dict.fromkeys(edit.inserted, _identity))
            if not _alike(old, new, 0.0):
                raise TraceError(f'rewritten, it computes something else: {_first_difference(old, new)}')


def prove_swap(
    reading: Reading, module: nn.Module, edit: Edit, cores: Mapping[bool, dict[str, Core]], reads_keys: bool
) -> None:
    """Compares the swapped forward with that of the module's own class: all but the cores must be as before.

    Args:
        reading: The reading of the module.
        module: The module, of a weightless copy.
        edit: The edit.
        cores: The cores that were replaced, by the names of the new children, for either mode.
        reads_keys: Whether the new cores take keys and values beside queries.

    Raises:
        TraceError: If they differ in more than the cores, or one of them cannot be run by itself.
    """
    graphs = reading.trace.graphs
    for training in (False, True) if graphs[True] is not graphs[False] else (False,):
        with _explained(module), _WithoutDropout():
            # Larger numbers than elsewhere, so that a softmax is far from a mean and shows a wrong scale.
            real = (nn.Softmax, *PASSING_LAYERS)
            adding = {name for core in cores[training].values() for name in core.adding}
            proof = _Proof(StandIns(reading, module, training, spread=2.0, real=real, adding=adding))
            old = proof.run(edit.base, {})
            values = proof.run_graph(reading, cores[training])
            seen: dict[str, tuple[Any, ...]] = {}
            stand_ins = {name: _core_stand_in(name, core, values, seen) for name, core in cores[training].items()}
            new = proof.run(patched_class(edit), stand_ins)
            _check_around(old, new, values[output_of(reading.trace.graphs[training])])
            for name, core in cores[training].items():
                _check_core(core, values, seen[name], reads_keys)


def prove_output(module: nn.Module, call: Call, edit: Edit) -> None:
    """Runs a forward that calls the old one and passes on what it returns, once on meta tensors, to see that it fits.

    Raises:
        TraceError: If it does not.
    """
    stand_in = shell_of(module, patched_class(edit))
    stand_in.__dict__.update(dict.fromkeys(edit.inserted, _identity))
    try:
        with torch.no_grad(), LayoutMode():
            out = stand_in(*call.args, **call.kwargs)
    except Exception as error:
        raise TraceError(f'{_named(module)} does not run when it is called by another: {error}') from error
    if [leaf.shape for leaf in tensors_in(out)] != [leaf.shape for leaf in tensors_in(call.output)]:
        raise TraceError(f'{_named(module)} returns something else when it is called by another')


@dataclass(frozen=True)
class _Outcome:
    """What a run of a forward gave and left behind.

    Attributes:
        result: What it returned.
        arguments: Its arguments, as they are afterwards.
        read: The tensors that it reads, as they are afterwards.
        calls: What children were called, and a number that tells with what.
        drawn: The random generators afterwards.
    """

    result: Any
    arguments: dict[str, Any]
    read: list[Tensor]
    calls: list[tuple[str, float]]
    drawn: tuple[Any, ...]


class _Proof:
    """Runs of forwards of one module, each on fresh stand-ins with equal numbers."""

    def __init__(self, stand_ins: StandIns) -> None:
        self.stand_ins = stand_ins

    def run(self, cls: Any, new_children: Mapping[str, Callable[..., Any]]) -> _Outcome:
        """Runs the forward of a class; raises TraceError if it changes what a graph cannot show."""
        module, read = self.stand_ins.build(cls)
        module.__dict__.update(new_children)
        base = type(self.stand_ins.module)
        given = cloned(self.stand_ins.arguments)
        with torch.no_grad(), preserved_random_state(on_gpus=False):
            torch.default_generator.manual_seed(0)  # of the CPU only; torch.manual_seed would reach the GPUs too
            before = _outlines(module, base)
            args, kwargs = passed(forward_signature(base), given)
            result = cls.forward(module, *args, **kwargs)
            after = _outlines(module, base)
            drawn = random_states()
        # A graph has no attributes and no globals: what a forward leaves in them would be lost.
        changed = [name for name, value in after.items() if before.get(name, value) != value]
        if changed:
            raise TraceError(f'it changes {changed[0]}, which a graph cannot show')
        return _Outcome(result, given, read, self.stand_ins.calls, drawn)

    def run_graph(self, reading: Reading, cores: Mapping[str, Core]) -> Values:
        """The values of the output and of what goes into cores, of the graph and with copies of what comes out."""
        stand_ins = self.stand_ins
        graph, known = reading.trace.graphs[stand_ins.training], reading.values[stand_ins.training]
        outputs = [core.output for core in cores.values()]
        wanted = [output_of(graph), *chain.from_iterable(map(_nodes, cores.values()))]
        module, _ = stand_ins.build(type(stand_ins.module))
        runner = Partial(module, graph, cloned(stand_ins.arguments))
        return run_part(runner, wanted, needed_for(wanted, stand_ins.module, known), outputs)


@contextmanager
def _explained(module: nn.Module) -> Iterator[None]:
    """Says of whatever goes wrong in which forward it does, as a TraceError."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f'{_named(module)}: {error}') from error
    except Exception as error:  # the forward needs something of its children that stand-ins do not have
        raise TraceError(f'{_named(module)} cannot be checked by itself: {error}') from error


def _named(module: nn.Module) -> str:
    code = inspect.unwrap(type(module).forward).__code__
    return f'{type(module).__name__}.forward ({from_package(code.co_filename)}:{code.co_firstlineno})'


def _first_difference(old: _Outcome, new: _Outcome) -> str:
    """What differs first in two runs, in the order of a forward: calls of children, and what comes of them."""
    # The first child that is given something else stands right behind the first line that differs.
    for one, other in zip_longest(old.calls, new.calls):
        if one != other:
            called = (one or other)[0]
            return f'{called} is given something else' if one and other else f'{called} is called once more or less'
    for what, one, other in (
        ('its result is another', old.result, new.result),
        ('its arguments are left in another state', old.arguments, new.arguments),
        ('what it reads is left in another state', old.read, new.read),
    ):
        if not _alike(one, other, 0.0):
            return what
    return 'it draws other random numbers'


def _outlines(module: nn.Module, cls: type) -> dict[str, Any]:
    """What a forward might change beside tensors: its attributes, those of its children, and what it sees outside."""
    inside = {f'self.{name}': value for name, value in outline(module).items()}
    return {**inside, 'what is outside of its module': [plain(value) for value in surroundings(cls)]}


def _identity(x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
    if shortcut is None:
        return x.clone()  # a new tensor, as of any module, so that a change in place shows
    return shortcut + x if shortcut_first else x + shortcut


def _nodes(core: Core) -> Iterator[fx.Node]:
    yield from (core.query, core.key, core.value, core.output, core.scale.query)
    yield from (factor for factor, _ in core.scale.factors)
    for step in core.steps:
        yield from (step.node, *step.node.all_input_nodes)


def _core_stand_in(name: str, core: Core, values: Values, seen: dict[str, tuple[Any, ...]]) -> Callable[..., Tensor]:
    """A stand-in for a new core, which returns what the old one did and notes what it is given."""

    def stand_in(*inputs: Any) -> Tensor:
        seen[name] = inputs
        result: Tensor = values[core.output].clone()
        return result.mT if core.transposed else result

    return stand_in


def _check_around(old: _Outcome, new: _Outcome, of_graph: Any) -> None:
    if not _alike(old.result, of_graph, SWAP_TOLERANCE):
        raise TraceError('its trace computes something else, perhaps for lack of what it changes in place')
    if not _alike(new.result, of_graph, SWAP_TOLERANCE):
        raise TraceError('swapped, it computes something else around its core')
    if not _alike((old.arguments, old.read), (new.arguments, new.read), SWAP_TOLERANCE):
        raise TraceError('swapped, it leaves its arguments or buffers in another state')
    # Children that only fed the old core are not called any more; the others are given what they were given.
    if not all(any(_alike(call, other, SWAP_TOLERANCE) for other in old.calls) for call in new.calls):
        raise TraceError('swapped, it gives something else to its children')


def _check_core(core: Core, values: Values, inputs: tuple[Any, ...], reads_keys: bool) -> None:
    query, key, value = values[core.query], values[core.key], values[core.value]
    key, value = key.mT if core.key_transposed else key, value.mT if core.transposed else value
    expected = [query]
    if reads_keys:
        factors = [values[factor] for factor, _ in core.scale.factors]
        unscaled = values[core.scale.query].mT if core.scale.transposed else values[core.scale.query]
        expected = [core.scale.of_queries(unscaled, factors, query.shape[-1]), key, value]
    if not _alike(list(inputs[: len(expected)]), expected, SWAP_TOLERANCE):
        raise TraceError('swapped, its core gets something else')
    called = kind_of(core.output) is Kind.ATTENTION
    output = values[core.output].mT if core.transposed else values[core.output]
    if not called:
        weights = replayed(core, values, with_terms=True).to(value.dtype)
        if not _alike(weights @ value, output, SWAP_TOLERANCE):
            raise TraceError('its logits are changed in a way that is not read, such as in place')
        output = replayed(core, values, with_terms=False).to(value.dtype) @ value
    if reads_keys and not (called and core.extras):
        query, key, value = inputs[:3]
        plainly = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value
        if not _alike(plainly, output, SWAP_TOLERANCE):
            raise TraceError('softmax(q k / sqrt(d)) v is not what its core computes')


class _WithoutDropout(TorchFunctionMode):
    """Lets dropout that a forward calls as a function do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, torch.dropout):
            return args[0] if args else kwargs['input']
        if func is F.multi_head_attention_forward:
            kwargs['training'] = False
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif 'dropout_p' in kwargs:
                kwargs['dropout_p'] = 0.0
        return func(*args, **kwargs)


def _alike(first: Any, second: Any, tolerance: float) -> bool:
    """Whether two values agree: in form and type, and in numbers bit for bit or to a part."""
    if isinstance(first, _Outcome):
        first, second = vars(first), vars(second)
    one, one_form = tree_flatten(first)
    other, other_form = tree_flatten(second)
    return one_form == other_form and all(_alike_leaves(*pair, tolerance) for pair in zip(one, other))


def _alike_leaves(first: Any, second: Any, tolerance: float) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        if tolerance and isinstance(first, float) and isinstance(second, float):
            return abs(first - second) <= tolerance * max(1.0, abs(first))
        return type(first) is type(second) and bool(first == second)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if torch.equal(first, second):
        return True
    if not tolerance:
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    part = tolerance if first.dtype in (torch.float32, torch.float64) else NARROW_TOLERANCE
    return torch.allclose(first, second, rtol=part, atol=part, equal_nan=True)
