"""A module with stand-ins for all that its forward calls, so that the forward can be run by itself, on numbers.

For example, of ``x + self.drop(self.norm(self.conv(x)))`` none of the three children is computed: each returns numbers
of the shape that was recorded, which depend on what it is given. So a forward costs a few operations on single
numbers, needs no weights, and shows in its result whatever it does to data on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import count
from math import isfinite, nan, sin
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from sem_timm.meta.probing import Call
from sem_timm.meta.state import INFRASTRUCTURE
from sem_timm.surgery.aliasing import Passing, linked, passed_on, tensors_in
from sem_timm.surgery.arguments import same_tensors
from sem_timm.surgery.fitting import ON_TRIAL
from sem_timm.surgery.graphs import called_module
from sem_timm.surgery.reading import Reading

_GOLDEN = 0.6180339887498949


class Numbers:
    """A low-discrepancy sequence around zero, of which tensors of any shape are views.

    Args:
        length: The number of entries of the largest tensor.
        spread: The largest number.
    """

    def __init__(self, length: int, spread: float) -> None:
        sequence = torch.arange(length + 1000, dtype=torch.float32).mul_(_GOLDEN).frac_()
        self._sequence = sequence.sub_(0.5).mul_(2 * spread)

    def like(self, value: Any, seed: int) -> Any:
        """Numbers of the shape and type of a meta value; zero for integers, which are mostly indices."""
        places = count(seed % 900)
        return tree_map_only(Tensor, lambda tensor: self._tensor(tensor, next(places)), value)

    def _tensor(self, value: Tensor, place: int) -> Tensor:
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return self._sequence[place : place + value.numel()].view(value.shape).to(value.dtype)


class StandIns:
    """Stand-ins for what one mode of a forward calls and reads, the same ones in every run of it.

    Args:
        reading: The reading of the module.
        module: The module, of a weightless copy.
        training: The mode.
        spread: How large numbers are.
        real: Classes of children that have no weights and are run as they are.
        adding: Names of children that add something to what they are given, and return it here as it is.
    """

    def __init__(
        self,
        reading: Reading,
        module: nn.Module,
        training: bool,
        *,
        spread: float = 0.5,
        real: tuple[type, ...] = (),
        adding: Collection[str] = (),
    ) -> None:
        self.module, self.training, self.adding = module, training, adding
        graph, values = reading.trace.graphs[training], reading.values[training]
        self._read = {str(node.target): values[node] for node in graph.nodes if node.op == 'get_attr'}
        self._outputs: dict[str, list[tuple[Any, Passing]]] = {}
        for node in graph.nodes:
            if node.op == 'call_module' and not isinstance(called_module(node, module), real):
                args, kwargs = map_arg((node.args, node.kwargs), values.get)
                passing = passed_on(Call(args, kwargs, values[node]))
                self._outputs.setdefault(str(node.target), []).append((values[node], passing))
        needed = tensors_in([reading.trace.values, self._read, [o for of in self._outputs.values() for o in of]])
        self.numbers = Numbers(max((tensor.numel() for tensor in needed), default=0), spread)
        self.arguments = {n: self.numbers.like(v, seed) for seed, (n, v) in enumerate(reading.trace.values.items())}
        for name, other in same_tensors(reading.trace.values).items():
            self.arguments[name] = self.arguments[other]
        self._samples: dict[str, list[float]] = {}  # what each child was given in the first run
        self.calls: list[tuple[str, float]] = []

    def build(self, cls: type) -> tuple[nn.Module, list[Tensor]]:
        """The module, of some class, with stand-ins, and the numbers that stand for the tensors that it reads."""
        shells = {each: shell_of(each, type(each)) for each in self.module.modules()}
        shells[self.module] = root = shell_of(self.module, cls)
        for shell in shells.values():  # under all the names that a child has, and in lists that hold it as well
            shell.__dict__.update({key: _with_shells(value, shells) for key, value in shell.__dict__.items()})
            _empty_caches(shell)
        root.__dict__['training'] = self.training
        root.__dict__[ON_TRIAL] = True  # a copy beside it would call the same stand-ins
        read = [self._put(shells.values(), name) for name, value in self._read.items() if isinstance(value, Tensor)]
        self.calls = []
        for seed, target in enumerate(self._outputs):
            called = self._stand_in(target, 7 * seed)
            if '.' in target or target in root._modules:
                root.get_submodule(target).__dict__['forward'] = called
            else:  # one of the module's own methods
                root.__dict__[target] = called
        return root, read

    def _put(self, shells: Iterable[nn.Module], name: str) -> Tensor:
        """Puts numbers in the place of a tensor wherever it is, and returns them."""
        tensor = operator.attrgetter(name)(self.module)
        scale = max(1, tensor[0].numel()) ** -0.5 if tensor.ndim > 1 and tensor.numel() else 1.0  # as weights have it
        new = cloned(self.numbers.like(tensor, len(name)))
        new = new * scale if new.is_floating_point() else new
        for shell in shells:
            for tensors in (shell._parameters, shell._buffers, shell.__dict__):
                tensors.update({key: new for key, value in tensors.items() if value is tensor})
        return new

    def _stand_in(self, target: str, seed: int) -> Callable[..., Any]:
        """A stand-in for a child: returns numbers of the recorded shapes that depend on what it is given.

        What the child passes on, the stand-in passes on as well: a change of the one in place is one of the other. A
        child that is called several times returns, in later runs, what belongs to the first call with such arguments
        that is left: a swap may leave out some of them.
        """
        outputs, known = self._outputs[target], self._samples.get(target)
        left = list(range(len(outputs)))

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if target in self.adding:
                return args[0].clone()
            sample = _sample((args, kwargs))
            # One whose result nobody uses may still count, or move statistics.
            self.calls.append((target, sample if isfinite(sample) else 0.0))
            if known is None:
                self._samples.setdefault(target, []).append(sample)
                place = left[0]
            else:
                place = min(left, key=lambda call: abs(known[call] - sample))
            left.remove(place)
            template, passing = outputs[place]
            factor = 1 + 0.5 * sin(sample) if isfinite(sample) else nan
            return linked(_scaled(self.numbers.like(template, seed), factor), passing, args, kwargs)

        return stand_in


def _empty_caches(shell: nn.Module) -> None:
    """Takes tensors out of dictionaries in which a forward keeps what it once computed from weights."""
    for key, value in shell.__dict__.items():
        if type(value) is dict and key not in INFRASTRUCTURE and tensors_in(value):
            shell.__dict__[key] = {name: entry for name, entry in value.items() if not tensors_in(entry)}


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


def shell_of(module: nn.Module, cls: type) -> nn.Module:
    """A module with the same attributes whose dictionaries can be changed without changing the module."""
    shell: nn.Module = object.__new__(cls)
    shell.__dict__.update(module.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell


def cloned(value: Any) -> Any:
    """A value with copies of the tensors in it, one of each."""
    copies: dict[Tensor, Tensor] = {tensor: tensor.clone() for tensor in {*tensors_in(value)}}
    return tree_map_only(Tensor, copies.__getitem__, value)


def _sample(value: Any) -> float:
    """A number that depends on a few hundred entries of each tensor, on where they are, and on its place in memory."""
    total = 0.0
    for tensor in (t for t in tensors_in(value) if t.is_floating_point() and t.numel()):
        entries = tensor.reshape(-1)[:: max(1, tensor.numel() // 251)].double()
        weights = torch.linspace(0.5, 1.5, len(entries), dtype=torch.float64)
        total += float(entries @ weights) / len(entries)
        # A layer may add up in another order if its input lies differently in memory.
        total += 1e-3 * sum(stride / (axis + 2) for axis, stride in enumerate(tensor.stride()))
    return total


def _scaled(value: Any, factor: float) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor * factor if tensor.is_floating_point() else tensor, value)
