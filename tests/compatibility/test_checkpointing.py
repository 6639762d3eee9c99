"""Activations that are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, assert_same_gradients, gradients

# In double precision, of gradients that are summed up in another order.
EXACT = {'rtol': 1e-9, 'scale': 1e-12}


@capability('`set_grad_checkpointing`: the same gradients')
def test_set_grad_checkpointing(twins: Twins) -> None:
    def learn(model: Any, checkpointing: bool) -> dict[str, torch.Tensor]:
        model.train().set_grad_checkpointing(checkpointing)
        return gradients(model, twins.images().to(next(model.parameters()).dtype))

    expected = learn(twins.base, True)
    assert_same_gradients(twins, expected, learn(twins.model, True))
    model = twins.moved().double()
    # What is computed again is computed the plain way: a gate sums up its gradients in another order.
    assert_close(learn(model, True), learn(model, False), **EXACT)


@capability('`torch.utils.checkpoint` around each patched module: the same gradients')
def test_torch_checkpoint(twins: Twins) -> None:
    model = twins.moved().double().train()
    images = twins.images().double()
    expected = gradients(model, images)
    calls: list[str] = []
    for part in sem_timm.patched_modules(model):
        again(model.get_submodule(part.name), calls)
    assert_close(gradients(model, images), expected, **EXACT)
    assert len(calls) == 2 * len(sem_timm.patched_modules(model))


def again(module: nn.Module, calls: list[Any]) -> None:
    """Makes a module compute its forward a second time in the backward pass; each time is noted."""
    forward = module.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return forward(*args, **kwargs)

    module.forward = lambda *args, **kwargs: checkpoint(noted, *args, use_reentrant=False, **kwargs)
