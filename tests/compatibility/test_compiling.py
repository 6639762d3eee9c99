"""torch.compile without graph breaks: forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, gradients, outputs, unpatched


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test profits from, or is hindered by, what was compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@capability('`torch.compile(fullgraph=True)`, captured only', slow=True)
def test_compile_captured(twins: Twins) -> None:
    check_compile(twins, twins.moved(), backend='eager', batch_sizes=(2,))


def check_compile(twins: Twins, model: nn.Module, backend: str, batch_sizes: tuple[int, ...]) -> None:
    """The compiled model has the results and gradients of the model; one graph serves all sizes of batches."""
    expected = [(outputs(model, x), gradients(model, x)) for x in map(twins.images, batch_sizes)]
    try:
        found = compiled(twins, model, backend, batch_sizes)
    except Exception:
        with unpatched():
            compiled(twins, twins.base, backend, batch_sizes)
        raise
    assert_close(found, expected, rtol=1e-3, scale=1e-3)  # fused operations round differently


def compiled(twins: Twins, model: nn.Module, backend: str, batch_sizes: tuple[int, ...]) -> list[object]:
    dynamic = True if len(batch_sizes) > 1 else None
    use = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    results = []
    for number, batch_size in enumerate(batch_sizes):
        images = twins.images(batch_size)
        with torch.compiler.set_stance('default' if number == 0 else 'fail_on_recompile'):
            learned = gradients(model, images, call=use)
        with torch.no_grad():
            results.append((use(images), learned))
    return results
