"""A module with stand-ins for all that its forward calls, so that the forward can be run by itself, on numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from math import isfinite
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.surgery.passing import Passing
from sem_timm.surgery.reading import Reading

_GOLDEN = 0.6180339887498949


class Numbers:
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


def most_entries(values: Iterable[Any]) -> int:
    """The number of entries of the largest tensor among some values."""
    return max((leaf.numel() for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)), default=0)


def cloned(value: Any) -> Any:
    """A value with copies of the tensors in it."""
    return tree_map_only(Tensor, torch.clone, value)


def module_with_stand_ins(
    module: nn.Module,
    reading: Reading,
    cls: type,
    training: bool,
    numbers: Numbers,
    passing: Mapping[fx.Node, Passing],
) -> tuple[nn.Module, list[Tensor]]:
    """The module with numbers for the tensors its forward reads, which are told, and stand-ins for all it calls."""
    shells = {each: shell_of(each, type(each)) for each in module.modules()}
    shells[module] = root = shell_of(module, cls)
    for shell in shells.values():  # under all the names that a child has, and in lists that hold it as well
        shell.__dict__.update({key: _with_shells(value, shells) for key, value in shell.__dict__.items()})
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
        if '.' in target or target in root._modules:
            root.get_submodule(target).__dict__['forward'] = called
        else:  # one of the module's own methods
            root.__dict__[target] = called
    return root, read


def _with_shells(value: Any, shells: dict[nn.Module, nn.Module]) -> Any:
    """A value with shells for the modules in it; the value itself if there are none."""
    if isinstance(value, nn.Module):
        return shells.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, shells.get(value.__self__, value.__self__))
    if isinstance(value, partial):
        return partial(_with_shells(value.func, shells), *_with_shells(value.args, shells), **value.keywords)
    if type(value) in (list, tuple) and any(callable(entry) for entry in value):
        return type(value)(_with_shells(entry, shells) for entry in value)
    if type(value) is dict and any(callable(entry) for entry in value.values()):
        return {key: _with_shells(entry, shells) for key, entry in value.items()}
    return value


def _with_numbers(shells: Iterable[nn.Module], tensor: Any, node: fx.Node, numbers: Numbers) -> Iterator[Tensor]:
    """Puts numbers in the place of a tensor wherever it is, and returns them."""
    if not isinstance(tensor, Tensor):
        return
    new = cloned(numbers.like(tensor, len(str(node.target))))
    for shell in shells:
        for tensors in (shell._parameters, shell._buffers, shell.__dict__):
            tensors.update({name: new for name, value in tensors.items() if value is tensor})
    yield new


def shell_of(module: nn.Module, cls: type) -> nn.Module:
    """A module with the same attributes whose dictionaries can be changed without changing the module."""
    shell: nn.Module = object.__new__(cls)
    shell.__dict__.update(module.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell


# A value of the shapes that a call returns, and for each of its tensors which of those that it was given it shows.
_Output = tuple[Any, Passing]


def _calls(numbers: Numbers, templates: list[_Output], seed: int) -> Callable[..., Any]:
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
        known, which = tree_leaves((args, kwargs)), iter(passing)

        def passed(new: Tensor) -> Tensor:
            index = next(which)
            known.append(new if index is None else _view_like(new, known[index]))
            returned: Tensor = known[-1]
            return returned

        return tree_map_only(Tensor, passed, result)

    return stand_in


def _view_like(new: Tensor, given: Tensor) -> Tensor:
    """A tensor that shows numbers of another, in the shape of a third; which of them does not matter."""
    if new.shape == given.shape:
        return given
    fits = given.storage_offset() + new.numel() <= given.untyped_storage().nbytes() // given.itemsize
    return given.as_strided(new.shape, new.stride()) if fits and new.dtype == given.dtype else new


def returning_given(method: Callable[..., Any]) -> Callable[..., Any]:
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
