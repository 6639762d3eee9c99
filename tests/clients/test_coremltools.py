"""Conversion to Core ML, for phones; what it computes can only be run on a Mac.

Its tensors have five axes at most, and those of halo attention six.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.clients.models import swapped

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of the versions of other packages
    import coremltools

PROGRAM = 'coremltools'
PACKAGES = ('coremltools',)

pytestmark = pytest.mark.filterwarnings('ignore')  # it warns of itself, of numpy and of tracing


@pytest.mark.parametrize('operation', ['external', 'eamlp', 'efficient', 'linear', 'catt', 'caam'])
def test_attentions(operation: str) -> None:
    """`coremltools.convert` of traces of swapped transformers"""
    traced = torch.jit.trace(swapped('test_vit', operation, depth=1, img_size=64), torch.randn(1, 3, 64, 64))
    shape = coremltools.TensorType(shape=(1, 3, 64, 64))
    converted = coremltools.convert(traced, inputs=[shape], convert_to='mlprogram', skip_model_load=True)
    assert converted.get_spec().WhichOneof('Type') == 'mlProgram'
