"""Blocks that ask for something while they run, each with its patched twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sem_timm


class Block(nn.Module):
    """Some layers on 8 channels; each block below has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pick = Pick()
        self.register_buffer('mean', torch.zeros(1, 8, 1, 1))
        self.calls = 0
        self.cache: dict[Any, Tensor] = {}


class Pick(nn.Module):
    """A child with optional arguments."""

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False) -> Tensor:
        x = x if mask is None else x * mask
        return x * 2 if twice else x


class Net(nn.Module):
    """A stem and one block, which is called with further arguments."""

    def __init__(self, block: nn.Module, *more: Any, **arguments: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block
        self.more, self.arguments = more, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x), *self.more, **self.arguments)


def block(forward: Callable[..., Any]) -> Any:
    return type(f'Block_{forward.__name__}', (Block,), {'forward': forward})().eval()


SIZE = (3, 8, 8)


def twins(forward: Callable[..., Any], *more: Any, **arguments: Any) -> tuple[Any, Any]:
    """A block and its patched twin with the same weights."""
    base, model = block(forward), Net(block(forward), *more, **arguments)
    model.block.load_state_dict(base.state_dict())
    sem_timm.patch_model(model, target='block', position='residual', input_size=SIZE)
    return base, model.block


def assert_same_call(base: nn.Module, patched: nn.Module, *args: Any, **kwargs: Any) -> None:
    for training in (False, True):
        with torch.no_grad():
            torch.manual_seed(0)
            expected = base.train(training)(*args, **kwargs)
            torch.manual_seed(0)
            assert torch.equal(expected, patched.train(training)(*args, **kwargs))
