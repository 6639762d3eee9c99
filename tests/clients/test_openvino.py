"""Inference by OpenVINO, converted from the model itself."""

from __future__ import annotations

from typing import Any

import openvino
import pytest
import torch
from torch import Tensor

from tests.clients.models import images, models, swapped

PROGRAM = 'openvino'
PACKAGES = ('openvino',)

pytestmark = [
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),  # of sizes that are numbers in the trace
    pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning'),
]


def compiled(model: Any, example: Tensor) -> Any:
    """A model for any batch, in the precision of its weights."""
    converted = openvino.convert_model(model, example_input=example, input=[-1, *example.shape[1:]])
    return openvino.Core().compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})


def test_gates() -> None:
    """`convert_model` of a patched network, another batch"""

    def use(model: Any) -> Any:
        return torch.from_numpy(compiled(model.eval(), images())(images(3).numpy())[0])

    models().compare(use, 1e-5)


@pytest.mark.parametrize('batch', [2, 3])
@pytest.mark.parametrize('operation', ['external', 'linear', 'efficient', 'eamlp'])
def test_attentions(operation: str, batch: int) -> None:
    """`convert_model` of swapped transformers, a batch of as many images as there are heads, and another"""
    model = swapped('test_vit', operation, depth=1, img_size=64)
    found = compiled(model, images(2))(images(batch).numpy())[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images(batch)), rtol=1e-4, atol=1e-4)
