"""Models as functions of their parameters and of single images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, assert_same_gradients, gradients, unpatched
from tests.outputs import loss_of, outputs
from tests.twins import assert_equal


@capability('`torch.func.functional_call`')
def test_functional_call(twins: Twins) -> None:
    images = twins.images()
    twins.same(lambda model: outputs(lambda x: functional_call(model, dict(model.named_parameters()), (x,)), images))
    moved = twins.moved()
    weights = moved.state_dict()

    def call(model: nn.Module) -> list[torch.Tensor]:
        return outputs(lambda x: functional_call(model, weights, (x,)), images)

    before = outputs(twins.model, images)
    assert_equal(call(twins.model), call(moved))
    assert_close(call(moved), outputs(moved, images))  # not bit for bit in timm's own model either (XCiT, torch 2.9)
    assert_equal(outputs(twins.model, images), before)


# torch computes what has no rule for batches image by image, and says so
slowly = pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')


@slowly
@capability('`vmap` over the batch')
def test_vmap(twins: Twins) -> None:
    images = twins.images(3)

    def use(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [vmap(lambda image: model(image[None])[0])(images)]

    twins.same(use)
    model = twins.moved()
    # Batches of one are multiplied by other kernels.
    assert_close(use(model), outputs(model, images), rtol=1e-3, scale=1e-4)


@slowly
@capability('gradients of single images (`vmap` of `grad`)')
def test_per_sample_gradients(twins: Twins) -> None:
    images = twins.images(3)

    def use(model: Any) -> dict[str, torch.Tensor]:
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(trained: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
            return loss_of(functional_call(model, {**weights, **trained}, (image[None],)))

        return vmap(grad(loss), (None, 0))(
            {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}, images
        )

    with unpatched():
        expected = use(twins.base)
    start = twins.moved()  # copies of it, since LeViT keeps what it computed of its biases
    assert_same_gradients(twins, expected, use(twins.model), rtol=1e-3, scale=1e-4)
    together = use(copy.deepcopy(start))
    for index, image in enumerate(images):
        alone = gradients(copy.deepcopy(start), image[None])
        both = {name: together[name][index] for name in alone}
        assert_close(both, alone, rtol=1e-3, scale=1e-3)
