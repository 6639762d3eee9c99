"""Conversion to Core ML, for phones; what it computes can only be run on a Mac.

Its tensors have five axes at most, and those of halo attention six.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tests.clients.models import models, swapped

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of the versions of other packages
    import coremltools

PROGRAM = 'coremltools'
PACKAGES = ('coremltools',)

pytestmark = pytest.mark.filterwarnings('ignore')  # it warns of itself, of numpy and of tracing


@pytest.mark.parametrize('architecture', ['test_resnet', 'test_convnext'])
def test_gates(architecture: str) -> None:
    """`coremltools.convert` of traces of networks with SEM"""
    _convert(models(architecture).stirred)


@pytest.mark.parametrize('operation', ['external', 'eamlp', 'efficient', 'linear', 'catt', 'caam'])
def test_attentions(operation: str) -> None:
    """`coremltools.convert` of traces of swapped transformers"""
    _convert(swapped('test_vit', operation, depth=1, img_size=64))


def _convert(model: nn.Module) -> None:
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    shape = coremltools.TensorType(shape=(1, 3, 64, 64))
    converted = coremltools.convert(traced, inputs=[shape], convert_to='mlprogram', skip_model_load=True)
    assert converted.get_spec().WhichOneof('Type') == 'mlProgram'
