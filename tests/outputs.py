"""What a model returns, whatever holds it, and a loss of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def outputs(model: Callable[..., Any], *inputs: Any) -> list[Tensor]:
    """What a model returns, without gradients."""
    with torch.no_grad():
        return tensors(model(*inputs))


def loss_of(value: Any) -> Tensor:
    """A loss that every output takes part in."""
    return torch.stack([output.float().square().mean() for output in tensors(value)]).sum()
