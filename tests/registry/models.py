"""What the tests of the registry do with models."""

from __future__ import annotations

import timm
import torch
from torch import nn

from sem_timm import SEM

BASES = [name for name in timm.list_models() if not timm.models.is_model_in_modules(name, ['registry'])]


def gates(model: nn.Module) -> dict[str, SEM]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SEM)}


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model.eval()(x)
    return [out] if isinstance(out, torch.Tensor) else list(out.values() if isinstance(out, dict) else out)


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def train(model: nn.Module) -> None:
    """Training in miniature: all parameters move, so that no branch is zero and no gate the identity any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
