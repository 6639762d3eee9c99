"""A rewritten forward against the original, in numbers, before it is used.

Both run on real tensors of the traced shapes, in the mode that the graph is for. The children, and methods that were
kept whole, are stand-ins that return numbers depending on what they were given, so the comparison costs a few
element-wise operations and needs no weights; the inserted modules stand in as identities. Results, and whatever the
forward did to its arguments and to the tensors that it read, must agree bit for bit.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import count
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from sem_timm.errors import TraceError
from sem_timm.surgery.bytecode import names_called, names_called_by
from sem_timm.surgery.graphs import own_methods_called
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.passing import Passing, passing_of_calls
from sem_timm.surgery.random_state import preserved_random_state, random_states
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.rewrite import Edit, patched_class
from sem_timm.surgery.skeleton import Call

_GOLDEN = 0.6180339887498949


def verify(reading: Reading | None, module: nn.Module, call: Call, edit: Edit) -> None:
    """Compares the rewritten forward with that of the module's own class, in both modes where they differ.

    Raises:
        TraceError: If they compute different things, or one of them cannot be run by itself.
    """
    if reading is None:
        _check_output_edit(module, call, edit)
        return
    graphs = reading.trace.graphs
    # A forward that looks at its mode may do so where the trace did not get to.
    passing = {mode: _passing(reading, module, mode) for mode in (False, True)}
    both = passing[True] != passing[False] or 'training' in names_called(type(module))
    for training in (False, True) if both else (False,):
        try:
            same = _agree(reading, module, edit, training, passing[training])
            if training and same and (own := _own_by_mode(graphs[True], module)):
                # What they return in training was not seen; it may be what they are given.
                same = _agree(reading, module, edit, training, passing[training], own)
        except Exception as error:  # the forward needs something of its children that stand-ins do not have
            raise TraceError(f'{_named(module)} cannot be checked by itself: {error}') from error
        if not same:
            raise TraceError(f'{_named(module)}: rewritten, it computes something else')


def _passing(reading: Reading, module: nn.Module, training: bool) -> dict[fx.Node, Passing]:
    graph, values = reading.trace.graphs[training], reading.values[training]
    return passing_of_calls(graph, module, values, reading.passing, training=training)


def _own_by_mode(graph: fx.Graph, module: nn.Module) -> set[str]:
    """The module's own methods that a graph calls and that ask for the mode."""
    return {name for name in own_methods_called(graph, module) if 'training' in names_called_by(type(module), name)}


def _check_output_edit(module: nn.Module, call: Call, edit: Edit) -> None:
    """Such a forward calls the old one, so running it once on meta tensors is enough to see that it fits."""
    stand_in = _shell(module, patched_class(edit))
    stand_in.__dict__.update(dict.fromkeys(edit.inserted, _identity))
    try:
        with torch.no_grad(), LayoutMode():
            out = stand_in(*call.args, **call.kwargs)
    except Exception as error:
        raise TraceError(f'{_named(module)} does not run when it is called by another: {error}') from error
    shapes = [[leaf.shape for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (out, call.output)]
    if shapes[0] != shapes[1]:
        raise TraceError(f'{_named(module)} returns something else when it is called by another')


def _named(module: nn.Module) -> str:
    code = inspect.unwrap(type(module).forward).__code__
    return f'{type(module).__name__}.forward ({code.co_filename.rsplit("site-packages/", 1)[-1]}:{code.co_firstlineno})'


def _agree(
    reading: Reading,
    module: nn.Module,
    edit: Edit,
    training: bool,
    passing: Mapping[fx.Node, Passing],
    returning: Collection[str] = (),
) -> bool:
    """Whether both forwards compute the same; with stand-ins for methods in ``returning`` that return what they get."""
    trace, values = reading.trace, reading.values[training]
    numbers = _Numbers(_longest([*values.values(), *trace.values.values()]))
    arguments = {name: numbers.like(value, index) for index, (name, value) in enumerate(trace.values.items())}
    results, drawn = [], []
    classes: tuple[Any, ...] = (edit.base, patched_class(edit))
    for cls in classes:
        stand_in, read = _stand_in(module, reading, cls, training, numbers, passing)
        stand_in.__dict__.update({name: _returning(stand_in.__dict__[name]) for name in returning})
        stand_in.__dict__.update(dict.fromkeys(edit.inserted, _identity))
        given = {name: _cloned(value) for name, value in arguments.items()}
        with torch.no_grad(), preserved_random_state(on_gpus=False):
            torch.default_generator.manual_seed(0)  # of the CPU only; torch.manual_seed would reach the GPUs too
            results.append((cls.forward(stand_in, **given), given, read, numbers.calls()))
            drawn.append(random_states())
    return drawn[0] == drawn[1] and _equal(*results)


def _identity(x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
    if shortcut is None:
        return x.clone()  # a new tensor, as of any module, so that a change in place shows
    return shortcut + x if shortcut_first else x + shortcut


class _Numbers:
    """A low-discrepancy sequence in (-0.5, 0.5), of which tensors of any shape are views."""

    def __init__(self, length: int) -> None:
        self._calls: list[tuple[int, float]] = []
        self._sequence = torch.arange(length + 1000, dtype=torch.float32).mul_(_GOLDEN).frac_().sub_(0.5)

    def note(self, seed: int, sample: float) -> None:
        """Notes a call of a child: one whose result nobody uses may still count, or move statistics."""
        self._calls.append((seed, sample if isfinite(sample) else 0.0))

    def calls(self) -> list[tuple[int, float]]:
        """The calls noted since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def like(self, value: Any, seed: int) -> Any:
        """Numbers of the shape and type of a meta value; zero for integers, which are mostly indices."""
        places = count(seed)
        return tree_map_only(Tensor, lambda tensor: self._tensor(tensor, next(places)), value)

    def _tensor(self, value: Tensor, place: int) -> Tensor:
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return self._sequence[place : place + value.numel()].view(value.shape).to(value.dtype)


def _longest(values: Iterable[Any]) -> int:
    return max((leaf.numel() for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)), default=0)


def _cloned(value: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, value)


def _equal(first: Any, second: Any) -> bool:
    one, one_form = tree_flatten(first)
    other, other_form = tree_flatten(second)
    return one_form == other_form and all(map(_equal_leaves, one, other))


def _equal_leaves(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and _equal_numbers(first, second)
    return type(first) is type(second) and bool(first == second)


def _equal_numbers(first: Tensor, second: Tensor) -> bool:
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def _stand_in(
    module: nn.Module,
    reading: Reading,
    cls: type,
    training: bool,
    numbers: _Numbers,
    passing: Mapping[fx.Node, Passing],
) -> tuple[nn.Module, list[Tensor]]:
    """The module with numbers for the tensors its forward reads, which are told, and stand-ins for all it calls."""
    shells = {each: _shell(each, type(each)) for each in module.modules()}
    shells[module] = root = _shell(module, cls)
    for shell in shells.values():  # under all the names that a child has
        shell.__dict__['_modules'] = {key: shells.get(child) for key, child in shell._modules.items()}
    root.__dict__['training'] = training
    graph, values = reading.trace.graphs[training], reading.values[training]
    outputs: dict[str, list[_Output]] = {}
    read: list[Tensor] = []
    for node in graph.nodes:
        if node.op == 'call_module':
            outputs.setdefault(str(node.target), []).append((values[node], passing[node]))
        elif node.op == 'get_attr':
            read += _with_numbers(shells.values(), operator.attrgetter(str(node.target))(module), node, numbers)
    for seed, (target, templates) in enumerate(outputs.items()):
        called = _calls(numbers, templates, seed)
        if target in reading.trace.methods:
            root.__dict__[target] = called
        else:
            root.get_submodule(target).__dict__['forward'] = called
    return root, read


def _with_numbers(shells: Iterable[nn.Module], tensor: Any, node: fx.Node, numbers: _Numbers) -> Iterator[Tensor]:
    """Puts numbers in the place of a tensor wherever it is, and returns them."""
    if not isinstance(tensor, Tensor):
        return
    new = _cloned(numbers.like(tensor, len(str(node.target))))
    for shell in shells:
        for tensors in (shell._parameters, shell._buffers, shell.__dict__):
            tensors.update({name: new for name, value in tensors.items() if value is tensor})
    yield new


def _shell(module: nn.Module, cls: type) -> nn.Module:
    """A module with the same attributes whose dictionaries can be changed without changing the module."""
    shell: nn.Module = object.__new__(cls)
    shell.__dict__.update(module.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell


# A value of the shapes that a call returns, and for each of its tensors which of those that it was given it shows.
_Output = tuple[Any, Passing]


def _calls(numbers: _Numbers, templates: list[_Output], seed: int) -> Callable[..., Any]:
    """A stand-in for a child: returns numbers of the recorded shapes that depend on what it is given.

    What the child passes on, the stand-in passes on as well: a change of the one in place is one of the other.
    """
    calls = iter(templates)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        sample = _sample((args, kwargs))
        numbers.note(seed, sample)
        template, passing = next(calls)
        result = _scaled(numbers.like(template, 7 * seed % 900), 1 + sample)
        if all(index is None for index in passing):
            return result
        given, which = tree_leaves((args, kwargs)), iter(passing)
        return tree_map_only(
            Tensor, lambda new: new if (i := next(which)) is None else _view_like(new, given[i]), result
        )

    return stand_in


def _view_like(new: Tensor, given: Tensor) -> Tensor:
    """A tensor that shows numbers of another, in the shape of a third; which of them does not matter."""
    if new.shape == given.shape:
        return given
    fits = given.storage_offset() + new.numel() <= given.untyped_storage().nbytes() // given.itemsize
    return given.as_strided(new.shape, new.stride()) if fits and new.dtype == given.dtype else new


def _returning(method: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for a method that returns the tensors which it is given, as far as their shapes allow."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = method(*args, **kwargs)
        return tree_map_only(Tensor, lambda new: next((old for old in given if old.shape == new.shape), new), result)

    return stand_in


def _sample(value: Any) -> float:
    """A number that depends on a few hundred entries of each tensor, on where they are, and on its place in memory."""
    total = 0.0
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            entries = tensor.reshape(-1)[:: max(1, tensor.numel() // 251)].double()
            weights = torch.linspace(0.5, 1.5, len(entries), dtype=torch.float64)
            total += float(entries @ weights) / len(entries)
            # A layer may add up in another order if its input lies differently in memory.
            total += 1e-3 * sum(stride / (axis + 2) for axis, stride in enumerate(tensor.stride()))
    return total


def _scaled(value: Any, factor: float) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor * factor if tensor.is_floating_point() else tensor, value)
