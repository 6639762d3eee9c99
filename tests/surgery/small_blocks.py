"""Blocks of a few layers, made of a forward each, and what shows where a module was inserted in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sem_timm


class Zero(nn.Module):
    """Returns zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Copy(nn.Module):
    """An identity that, as all layers do, returns a new tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Both(nn.Module):
    """Returns what it is given and something new."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


class Net(nn.Module):
    """A stem and one block, on 8 channels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(self.stem(x))


class Block(nn.Module):
    """Some layers; each block below adds them up in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.narrow = nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(8, 12, 1)
        self.drop = nn.Dropout(0.1)
        self.both = Both()
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.position = nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return x

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def branch_and_sum(self, x: Tensor) -> Tensor:
        return self.added(x, self.a(x))


def block(forward: Callable[..., Any]) -> nn.Module:
    """A block with this forward; its class has a name of its own, as classes that differ have."""
    return type(f'Block_{forward.__name__}', (Block,), {'forward': forward})().eval()


def left_of(forward: Callable[..., Any], x: Tensor, **options: Any) -> tuple[Any, nn.Module, int]:
    """The output without the branches, the block, and the number of sites."""
    model = Net(block(forward))
    sem_timm.patch_model(
        model, sem_timm.InsertConfig(Zero, position='residual', **options), target='block', input_size=(3, 8, 8)
    )
    (site,) = sem_timm.patched_modules(model)
    with torch.no_grad():
        return model.block(x.clone()), model.block, len(site.inserted)
