"""Quantisation by optimum-quanto."""

from __future__ import annotations

import copy
from typing import Any

import torch
from optimum.quanto import freeze, qint8, quantize

from tests.clients.models import assert_close, images, models, swapped

PROGRAM = 'optimum-quanto'
PACKAGES = ('optimum.quanto',)


def use(model: Any) -> Any:
    model = copy.deepcopy(model)
    quantize(model, weights=qint8)
    freeze(model)
    with torch.no_grad():
        return model(images())


def test_quantised_weights() -> None:
    """`quantize` and `freeze` to int8 weights: patched as plain, and close to what was not quantised"""
    given = models()
    given.compare(use, 1e-6)
    given.compare_with_plain_use(use, images(), 0.1)
    model = swapped(img_size=64)
    with torch.no_grad():
        assert_close(use(model), model(images()), 0.1)
