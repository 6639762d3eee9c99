"""Images of another size than the model was planned with."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_same_gradients, gradients, make
from tests.outputs import outputs
from tests.twins import assert_equal


def rectangle(height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@capability('`set_input_size`')
def test_set_input_size(twins: Twins) -> None:
    size = (128, 128) if twins.column.layout == 'NCHW, NHWC' else (96, 128)
    model = twins.moved()
    for each in (twins.base, twins.model, model):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # timm's resampling of position biases makes torch warn
            each.set_input_size(img_size=size)
    images = rectangle(*size)
    twins.same(lambda model: outputs(model, images))
    assert_same_gradients(twins, gradients(twins.base, images), gradients(twins.model, images))
    # The same as patching a model of that size.
    later = twins.patch(twins.base, input_size=(3, *size))
    later.load_state_dict(model.state_dict())
    assert_equal(outputs(later, images), outputs(model, images))
    assert not sem_timm.patched_modules(sem_timm.unpatch_model(model))


@capability('`dynamic_img_size=True`')
def test_dynamic_img_size(twins: Twins) -> None:
    twins = make(twins.operation, twins.name, dynamic_img_size=True)
    check_sizes(twins, [(64, 64), (96, 128), (48, 80)])


@capability('images of other sizes, without an option')
def test_other_sizes(twins: Twins) -> None:
    check_sizes(twins, [(64, 64), (64, 128), (128, 64)])


def check_sizes(twins: Twins, sizes: list[Any]) -> None:
    for size in sizes:
        images = rectangle(*size)
        twins.same(lambda model, images=images: outputs(model, images))
        assert_same_gradients(twins, gradients(twins.base, images), gradients(twins.model, images))
    # One that is planned at the other size computes the same.
    model, size = twins.moved(), sizes[-1]
    other = sem_timm.unpatch_model(twins.moved())
    other = twins.patch(other, input_size=(3, *size))
    other.load_state_dict(model.state_dict())
    for size in sizes:
        assert_equal(outputs(other, rectangle(*size)), outputs(model, rectangle(*size)))
