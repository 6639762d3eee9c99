"""Numbers of lower precision, and other layouts in memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import (
    Twins,
    assert_close,
    assert_same_gradients,
    gradients,
    move,
    new_parameters,
    unpatched,
)
from tests.outputs import outputs, tensors
from tests.twins import assert_equal


@capability('autocast to bfloat16')
def test_autocast_bfloat16(twins: Twins) -> None:
    check_autocast(twins, torch.bfloat16)


@capability('autocast to float16')
def test_autocast_float16(twins: Twins) -> None:
    check_autocast(twins, torch.float16)


def check_autocast(twins: Twins, dtype: torch.dtype) -> None:
    images, model = twins.images(), twins.moved()
    # Twice: torch 2.9 remembers weights that were cast without gradients, and has none for them.
    with torch.autocast('cpu', dtype):
        twins.same(lambda model: outputs(model, images))
        found = outputs(model, images)
    with torch.autocast('cpu', dtype):
        assert_same_gradients(twins, gradients(twins.base, images), gradients(twins.model, images))
        learned = gradients(model, images)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in learned.values())
    for half, full in zip(found, outputs(model, images)):
        # The precision of bfloat16 through a whole network.
        assert (full - half.float()).norm() < 0.1 * full.norm()


@capability('a model in bfloat16')
def test_bfloat16(twins: Twins) -> None:
    images = twins.images().bfloat16()
    twins.same(lambda model: outputs(copy.deepcopy(model).bfloat16(), images))
    later = twins.patch(copy.deepcopy(twins.base).bfloat16())
    assert {p.dtype for p in new_parameters(later).values()} == {torch.bfloat16}
    assert_equal(outputs(move(later), images), outputs(move(copy.deepcopy(twins.model).bfloat16()), images))


@pytest.mark.filterwarnings('ignore:TF32 acceleration:UserWarning')  # of any change of oneDNN's flags
@capability('`channels_last`: outputs stay so')
def test_channels_last(twins: Twins) -> None:
    images = twins.images().to(memory_format=torch.channels_last)

    def use(model: Any) -> Any:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        layouts: dict[str, Any] = {}
        for part in sem_timm.patched_modules(twins.model):
            block = model.get_submodule(part.name)
            block.register_forward_hook(
                lambda module, args, out, name=part.name: layouts.update({name: [t.stride() for t in tensors(out)]})
            )
        found = outputs(model, images)
        # oneDNN's backward of a 1 x 1 convolution of three channels with stride 2, as in the stems of RepVGG, writes
        # past the end of its memory in this layout (torch 2.15), without a patch too.
        with torch.backends.mkldnn.flags(enabled=False):
            return found, gradients(model, images), layouts

    with unpatched():
        expected, expected_gradients, base_layouts = use(twins.base)
    for model in (twins.model, twins.moved()):
        found, found_gradients, layouts = use(model)
        assert layouts == base_layouts  # of four axes or three, channels_last where they were without a patch
        # Convolutions round differently in another layout.
        assert_close(found, outputs(model, twins.images()), rtol=1e-3, scale=1e-3)
    found, found_gradients, _ = use(twins.model)
    assert_same_gradients(twins, expected_gradients, found_gradients)
    if twins.is_identity:
        assert_equal(found, expected)


@capability('dynamic quantisation to int8')
def test_dynamic_quantization(twins: Twins) -> None:
    def use(model: nn.Module, types: set[Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch announces another package for it
            quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), types, dtype=torch.qint8)
            return outputs(quantized, twins.images()), quantized

    with unpatched():
        expected, _ = use(twins.base, {nn.Linear})
    found, quantized = use(twins.model, {nn.Linear})
    assert any('quantized' in type(module).__module__ for module in quantized.modules())
    if twins.is_identity:
        # A decision is made of an eighth of a gate of which all logits are zero, whatever it is rounded to.
        assert_equal(found, expected)
    for half, full in zip(use(twins.moved(), {nn.Linear})[0], outputs(twins.moved(), twins.images())):
        assert (full - half).norm() < 0.1 * full.norm()  # of 256 steps in each of some layers
