"""Quantisation by torchao."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.clients.models import assert_close, images, models, swapped

PROGRAM = 'torchao'
PACKAGES = ('torchao',)


def test_weight_only_quantisation() -> None:
    """`quantize_` to int8 weights: patched as plain, and close to what was not quantised"""

    def use(model: Any) -> Any:
        model = copy.deepcopy(model)
        quantize_(model, Int8WeightOnlyConfig())
        with torch.no_grad():
            return model(images())

    given = models('test_vit', img_size=64)
    given.compare(use)
    given.compare_with_plain_use(use, images(), 0.05)
    model = swapped(img_size=64)
    with torch.no_grad():
        assert_close(use(model), model(images()), 0.05)
