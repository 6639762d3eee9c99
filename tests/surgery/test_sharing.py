"""What modules of one process share of a plan: only what holds for each of them."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.surgery.small_blocks import Net

SIZE = (3, 8, 8)


class Config:
    """Something that a description can only name by its identity."""


class Shift(nn.Module):
    """A layer that adds one."""

    def __init__(self, *configs: Config) -> None:
        super().__init__()
        self.configs = configs

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.configs is not None else x


class Layers(nn.Module):
    """A residual block that goes through its layers itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for layer in self.layers:
            y = layer(y)
        return x + y


class Doubled(nn.Module):
    """A residual block that looks at the type of an attribute."""

    def __init__(self, doubled: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.doubled = doubled

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.doubled is True:
            y = y * 2
        return x + y


class Two(nn.Module):
    """Two sums, each residual where its layer keeps the shape of what it is given."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, first, 1)
        self.second = nn.Conv2d(8, second, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def check_identity(block: nn.Module) -> nn.Module:
    """The block patched in a model, after a comparison with what it was."""
    model, images = Net(block).eval(), torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = model(images)
        sem_timm.patch_model(model, input_size=SIZE)
        assert torch.equal(model(images), expected)
    return model


@pytest.mark.parametrize('number', range(1, 6))
def test_children_that_only_one_model_knows_are_not_those_of_another(number: int) -> None:
    # Small numbers stand for structures of all models and for those of one; they must not be taken for each other.
    check_identity(Layers(Shift()))
    check_identity(Layers(*(Shift(Config()) for _ in range(number))))
    check_identity(Layers(Shift()))


@pytest.mark.parametrize('others', [(1, 1.0), (True, 1.0)])
def test_numbers_that_are_equal_and_of_other_types(others: tuple[Any, ...]) -> None:
    for value in (*others, True, 1):
        check_identity(Doubled(value))


def test_another_sum_is_residual_in_other_shapes() -> None:
    first, second = check_identity(Two(8, 1)), check_identity(Two(1, 8))
    for model, layer in ((first, 'first'), (second, 'second')):
        called = re.findall(r'self\.(\w+)', _forward_of(model))
        assert called[called.index('sem') - 1] == layer


def _forward_of(model: nn.Module) -> str:
    return inspect.getsource(type(model.get_submodule('block')).forward)


def test_a_class_that_gets_another_forward() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    def residual(self: Block, x: Tensor) -> Tensor:
        return x + self.conv(x)

    with pytest.raises(sem_timm.RefusedError):
        sem_timm.plan_model(Net(Block()), input_size=SIZE)
    Block.forward = residual  # type: ignore[method-assign]
    check_identity(Block())


FACTOR = 1.0


def scaled(x: Tensor) -> Tensor:
    return x * 1.0


class Surrounded(nn.Module):
    """A residual block whose forward depends on more than itself and its attributes."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def branch(self, x: Tensor) -> Tensor:
        return x + self.conv(x) * self.factor

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + scaled(self.conv(x) * FACTOR)


@pytest.mark.parametrize(
    ('owner', 'name', 'value'),
    [
        (Surrounded, 'factor', 3.0),
        (Surrounded, 'branch', lambda self, x: x + 3 * self.conv(x)),
        (sys.modules[__name__], 'FACTOR', 3.0),
        (sys.modules[__name__], 'scaled', lambda x: x * 3.0),
    ],
)
def test_what_a_forward_sees_may_change(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    check_identity(Surrounded())
    monkeypatch.setattr(owner, name, value)
    check_identity(Surrounded())


def test_what_a_closure_holds_may_change() -> None:
    factor = 1.0

    class Block(Surrounded):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x) * factor

    check_identity(Block())
    factor = 3.0
    check_identity(Block())


def test_models_run_in_other_threads_while_plans_are_made() -> None:
    model, images = Net(Layers(Shift())).eval(), torch.randn(2, *SIZE)
    # Of another class each: what is known need not be traced again.
    blocks = [type(f'Layers{number}', (Layers,), {'forward': _copied(Layers.forward)}) for number in range(10)]
    planned = [Net(block(Shift())) for block in blocks]
    done = threading.Event()
    with torch.no_grad():
        expected = model(images)

    def run() -> None:
        while not done.is_set():
            with torch.no_grad():
                assert torch.equal(model(images), expected)

    def plan() -> None:
        while planned:
            sem_timm.plan_model(planned.pop(), input_size=SIZE)

    call = nn.Module.__call__
    with ThreadPoolExecutor() as threads:
        running, *planning = [threads.submit(work) for work in (run, plan, plan)]
        wait(planning)
        done.set()
    for work in (running, *planning):
        work.result()
    assert nn.Module.__call__ is call


def _copied(function: Any) -> Any:
    return FunctionType(function.__code__, function.__globals__, function.__name__)
