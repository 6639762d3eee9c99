"""torch.compile without graph breaks: forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, gradients, unpatched
from tests.outputs import outputs

BATCH_SIZES = (2, 5, 3)

pytestmark = pytest.mark.filterwarnings('ignore:TF32 acceleration:UserWarning')  # of any change of oneDNN's flags


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test profits from, or is hindered by, what was compiled before; convolutions without oneDNN."""
    torch.compiler.reset()
    # Inductor lays images out as channels_last, in which a backward of oneDNN writes past the end of its memory (torch
    # 2.15), without a patch too; see `test_channels_last`.
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.compiler.reset()


@capability('`torch.compile(fullgraph=True)`, captured only: one graph for all batches', slow=True)
def test_compile_captured(twins: Twins) -> None:
    check_compile(twins, twins.moved(), backend='eager')


def check_compile(twins: Twins, model: nn.Module, backend: str) -> None:
    """The compiled model has the results and gradients of the model, for batches of several sizes."""
    expected = [(outputs(model, x), gradients(model, x)) for x in map(twins.images, BATCH_SIZES)]
    try:
        found = compiled(twins, model, backend)
    except Exception:
        with unpatched():
            compiled(twins, twins.base, backend)
        raise
    assert_close(found, expected, rtol=1e-3, scale=1e-3)  # fused operations round differently


def compiled(twins: Twins, model: nn.Module, backend: str) -> list[object]:
    use = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    results = []
    for number, batch_size in enumerate(BATCH_SIZES):
        images = twins.images(batch_size)
        # Inductor itself chooses other kernels from some size on, and compiles again for them, without a patch too.
        one_graph = number > 0 and backend == 'eager'
        with torch.compiler.set_stance('fail_on_recompile' if one_graph else 'default'):
            learned = gradients(model, images, call=use)
        with torch.no_grad():
            results.append((use(images), learned))
    return results
