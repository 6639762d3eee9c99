"""Activations that are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, assert_same_gradients, gradients
from tests.twins import assert_equal
from tests.versions import CHECKPOINTS_REENTRANTLY


@capability('`set_grad_checkpointing`: the same gradients')
def test_set_grad_checkpointing(twins: Twins) -> None:
    def learn(model: Any, checkpointing: bool) -> dict[str, torch.Tensor]:
        model.train().set_grad_checkpointing(checkpointing)
        return gradients(model, twins.images())

    expected = learn(twins.base, True)
    assert_same_gradients(twins, expected, learn(twins.model, True))
    model = twins.moved()
    # Computed again by a backward of its own, gradients are summed in another order.
    same = assert_close if CHECKPOINTS_REENTRANTLY else assert_equal
    same(learn(model, True), learn(model, False))


@capability('`torch.utils.checkpoint` around each patched module: the same gradients')
def test_torch_checkpoint(twins: Twins) -> None:
    model = twins.moved().train()
    expected = gradients(model, twins.images())
    calls: list[str] = []
    for part in sem_timm.patched_modules(model):
        again(model.get_submodule(part.name), calls)
    assert_equal(gradients(model, twins.images()), expected)
    assert len(calls) == 2 * len(sem_timm.patched_modules(model))


def again(module: nn.Module, calls: list[Any]) -> None:
    """Makes a module compute its forward a second time in the backward pass; each time is noted."""
    forward = module.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return forward(*args, **kwargs)

    module.forward = lambda *args, **kwargs: checkpoint(noted, *args, use_reentrant=False, **kwargs)
