"""SwappedGraphs the attention of models, and looking at what became of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sem_timm
from tests.families import Family
from tests.twins import inserted

_SWAPPED: dict[str, Any] = {}


def swap(model: nn.Module, operation: Any = 'external', **options: Any) -> Any:
    """The model with its attention swapped, which warns of what that means."""
    with pytest.warns(sem_timm.SwapWarning, match='needs training|without training'):
        return sem_timm.patch_model(model, operation, **options)


def swapped(
    family: Family, operation: Any = 'external', *, create: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A new model of a family with its attention swapped: a copy of one that is made once, from the same seed."""
    key = repr((family, operation, create, options))
    if key not in _SWAPPED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = family.create(**(create or {}))
            _SWAPPED[key] = swap(model, operation, input_size=family.input_size, **options)
    return copy.deepcopy(_SWAPPED[key])


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, *inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(*inputs))


def shapes(model: nn.Module, *inputs: Any) -> list[torch.Size]:
    return [output.shape for output in outputs(model, *inputs)]


def backward(model: nn.Module, *inputs: Any) -> None:
    """Gradients of a loss that every output takes part in."""
    losses = [output.float().square().mean() for output in tensors(model(*inputs))]
    torch.stack(losses).sum().backward()


def without_gradient(model: nn.Module) -> set[str]:
    """Names of the parameters that require a gradient and have none."""
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def assert_all_learn(model: nn.Module) -> None:
    """Every parameter that requires a gradient has one, and that of every new one is not zero."""
    assert without_gradient(model) == set()
    new = inserted(model)
    assert new and all(p.requires_grad for p in new.values())
    assert [name for name, p in new.items() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()] == []
