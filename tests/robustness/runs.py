"""One forward and backward of a network, with everything that can be seen of it, to be compared with another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """Everything that can be seen of one forward and backward."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    random_states: tuple[Any, ...]


def run(model: nn.Module, images: Tensor, mode: str) -> Run:
    """A forward and, if anything has a gradient, a backward, from the same random state."""
    model.train(mode == 'train')
    for parameter in model.parameters():
        parameter.grad = None
    images = images.clone().requires_grad_(mode not in ('no_grad', 'frozen'))
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    frozen = [p for p in model.parameters() if p.requires_grad] if mode == 'frozen' else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(mode != 'no_grad'):
            outputs = list(leaves(model(images)))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    losses = [
        (out.double() * torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)).sum()
        for out in outputs
        if isinstance(out, Tensor) and out.requires_grad
    ]
    if losses and mode != 'frozen':
        torch.stack(losses).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    return Run(outputs, {'images': images.grad, **gradients}, buffers, dict(attributes_of(model)), states)


def leaves(value: Any) -> Iterator[Any]:
    """The parts of an output with the types of what holds them, dataclasses included."""
    if isinstance(value, (tuple, list)):
        yield type(value).__name__
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from leaves(entry)
    elif is_dataclass(value):
        yield type(value).__name__
        for part in fields(value):
            yield from leaves(getattr(value, part.name))
    else:
        yield value


def attributes_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Counters, logs and caches: what a forward may have changed beside buffers."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if not key.startswith('_') and key != 'training':
                if isinstance(value, (list, dict, set)):
                    value = repr(value)
                yield f'{name}.{key}', value.detach().clone() if isinstance(value, Tensor) else value


def assert_equal_runs(first: Run, second: Run, where: str, leaky: bool = False) -> None:
    """Fails with the name of what differs; ``leaky`` leaves gradients the error of another order of summation."""
    assert len(first.outputs) == len(second.outputs), where
    for number, (one, other) in enumerate(zip(first.outputs, second.outputs)):
        assert same(one, other), f'{where}: output {number}'
        if isinstance(one, Tensor):
            alike = [[t.is_contiguous(), _is_channels_last(t)] for t in (one, other)]
            assert alike[0] == alike[1], f'{where}: output {number} lies differently in memory'
    largest = max((float(g.abs().max()) for g in first.gradients.values() if g is not None), default=0.0)
    for kind in ('gradients', 'buffers', 'attributes'):
        expected, got = getattr(first, kind), getattr(second, kind)
        for name, value in expected.items():
            assert name in got, f'{where}: {kind} {name} is gone'
            close = leaky and kind == 'gradients' and value is not None and _close(value, got[name], largest)
            assert same(value, got[name]) or close, f'{where}: {kind} {name}'
    assert same(first.random_states[0], second.random_states[0]), f'{where}: random state'
    assert first.random_states[1:] == second.random_states[1:], f'{where}: random state'


def same(first: Any, second: Any) -> bool:
    """Bit for bit, NaN being NaN."""
    if isinstance(first, Tensor):
        if not isinstance(second, Tensor) or first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first, second) or torch.equal(first.nan_to_num(), second.nan_to_num())
    return type(first) is type(second) and bool(first == second)


def _close(first: Tensor, second: Tensor, largest: float) -> bool:
    return torch.allclose(first, second, rtol=1e-3, atol=1e-5 * largest)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
