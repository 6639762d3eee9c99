"""torch.compile without graph breaks: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import mark_dynamic

from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, gradients, unpatched
from tests.outputs import outputs, tensors
from tests.versions import compiles_once_more, without_compiled_files

BATCH_SIZES = (2, 5, 3)
ALIKE = (5, 6)  # at 4 and at 8 torch chooses other kernels, and compiles anew

# What a model returns, and the gradients of its parameters by name.
Results: TypeAlias = tuple[list[Tensor], dict[str, Tensor]]

pytestmark = [
    pytest.mark.filterwarnings('ignore:TF32 acceleration:UserWarning'),  # of any change of oneDNN's flags
    pytest.mark.filterwarnings('ignore:dynamo_pgo force disabled:UserWarning'),  # of caches turned off
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test profits from, or is hindered by, what was compiled before, on disk too; convolutions without oneDNN."""
    torch.compiler.reset()
    # Inductor lays images out as channels_last, in which a backward of oneDNN writes past the end of its memory (torch
    # 2.15), without a patch too; see `test_channels_last`.
    with torch.backends.mkldnn.flags(enabled=False), without_compiled_files():
        yield
    torch.compiler.reset()


@capability('`torch.compile(fullgraph=True)`, captured only: one graph for all batches', slow=True)
def test_compile_captured(twins: Twins) -> None:
    check_compile(twins, partial(captured, twins), BATCH_SIZES)


@capability("`torch.compile(fullgraph=True, backend='inductor')`, dynamic batch", slow=True)
def test_compile_inductor(twins: Twins) -> None:
    check_compile(twins, partial(compiled_by_inductor, twins), ALIKE)


def check_compile(twins: Twins, compiled: Callable[[nn.Module], list[Results]], sizes: Sequence[int]) -> None:
    """The compiled model has the results and gradients of the model, for batches of several sizes."""
    model = twins.moved()
    try:
        found = compiled(model)
    except Exception:
        with unpatched():
            compiled(twins.base)
        raise
    expected = [(outputs(model, images), gradients(model, images)) for images in map(twins.images, sizes)]
    assert_close(found, expected, rtol=1e-3, scale=1e-3)  # fused operations round differently


def captured(twins: Twins, model: nn.Module) -> list[Results]:
    """With and without gradients; the graph of the first batch serves the others."""
    use = torch.compile(model, fullgraph=True, backend='eager', dynamic=True)
    results = []
    for number, images in enumerate(map(twins.images, BATCH_SIZES)):
        with compiles_once_more(number == 0):
            learned = gradients(model, images, call=use)
        results.append((outputs(use, images), learned))
    return results


def compiled_by_inductor(twins: Twins, model: nn.Module) -> list[Results]:
    """With gradients; the graph of the first batch serves the other.

    Both have about one size: from some size on torch chooses other kernels, and compiles anew, without a patch too.
    """
    use = torch.compile(model, fullgraph=True)
    results: list[Results] = []

    def keep(images: Tensor) -> Any:
        out = use(images)
        seen.append([tensor.detach().clone() for tensor in tensors(out)])
        return out

    for number, images in enumerate(map(twins.images, ALIKE)):
        mark_dynamic(images, 0)
        seen: list[list[Tensor]] = []
        with compiles_once_more(number == 0):
            learned = gradients(model, images, call=keep)
        results.append((seen[0], learned))
    return results
