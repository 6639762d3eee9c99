"""How well a swapped model does: the error of each layer on the original's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.attention_transfer.processes import number_of_processes, total
from sem_timm.surgery import tensors_in

Visit = Callable[[SwappedLayer, tuple[Any, ...], dict[str, Any], Tensor], None]


@contextmanager
def visiting(pair: Pair, visit: Visit) -> Iterator[nn.Module]:
    """The teacher, which shows each swapped layer's inputs and output to a function while it runs."""
    handles = []
    for layer in pair.layers:

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, layer: SwappedLayer = layer) -> None:
            visit(layer, args, kwargs, tensors_in(output)[0])

        handles.append(layer.teacher.register_forward_hook(hook, with_kwargs=True))
    try:
        yield pair.teacher
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def student_outputs(pair: Pair) -> Iterator[dict[str, Tensor]]:
    """What each swapped layer of the student gave in its last forward, by name, with its graph."""
    found: dict[str, Tensor] = {}
    handles = []
    for layer in pair.layers:

        def hook(_: nn.Module, args: Any, output: Any, name: str = layer.name) -> None:
            found[name] = tensors_in(output)[0]

        handles.append(layer.student.register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Spread:
    """Sums over the outputs of one layer for one kind of tokens, in float64.

    Attributes:
        count: Number of tokens.
        total: Sum of the original's outputs.
        squares: Sum of their squares.
        missed: Sum over all channels of the squared differences to the original.
    """

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    missed: float = 0.0

    def add(self, wanted: Tensor, given: Tensor) -> None:
        rows = wanted.flatten(0, -2).float()
        self.count += len(rows)
        self.total = self.total + rows.sum(0).cpu().double()
        self.squares = self.squares + rows.square().sum(0).cpu().double()
        self.missed += float((given - wanted).float().square().sum())

    def over_processes(self) -> None:
        """Takes in what all processes have seen."""
        if number_of_processes() > 1 and self.count:
            self.count = int(total(torch.tensor(self.count)))
            self.total, self.squares = total(torch.as_tensor(self.total)), total(torch.as_tensor(self.squares))
            self.missed = float(total(torch.tensor(self.missed, dtype=torch.float64)))

    @property
    def variance(self) -> float:
        """Mean squared distance of the original's outputs to their mean, per number."""
        squares, total = torch.as_tensor(self.squares), torch.as_tensor(self.total)
        return float((squares - total.square() / self.count).mean() / self.count)

    @property
    def missed_part(self) -> float:
        """The missed part of the variance; 1 is what the best constant would give."""
        numbers = self.count * torch.as_tensor(self.total).numel()
        return self.missed / numbers / max(self.variance, 1e-30)


@torch.no_grad()
def spreads(pair: Pair, batches: Iterable[Tensor]) -> dict[str, list[Spread]]:
    """Compares each swapped layer with its original on the original's inputs, by name and for each kind of tokens."""
    found: dict[str, list[Spread]] = {layer.name: [Spread(), Spread()] for layer in pair.layers}

    def visit(layer: SwappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = layer.token_groups(tensors_in(layer.student(*args, **kwargs))[0])
        for spread, wanted, tokens in zip(found[layer.name], layer.token_groups(output), given):
            spread.add(wanted, tokens)

    with visiting(pair, visit) as teacher:
        for images in batches:
            teacher(images)
    for kinds in found.values():
        for spread in kinds:
            spread.over_processes()
    return {name: [spread for spread in kinds if spread.count] for name, kinds in found.items()}


def error_of(kinds: list[Spread]) -> float:
    """The relative error of a layer: the root of the missed part of the variance, as a mean over kinds of tokens."""
    return (sum(spread.missed_part for spread in kinds) / len(kinds)) ** 0.5
