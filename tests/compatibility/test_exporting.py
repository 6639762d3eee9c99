"""Graphs that leave Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_close, unpatched
from tests.outputs import outputs

# LeViT keeps what it computes of its biases on itself
quietly = pytest.mark.filterwarnings('ignore:The tensor attribute:UserWarning')


@quietly
@capability('`torch.export`, dynamic batch', slow=True)
def test_export_batch(twins: Twins) -> None:
    check_export(twins, [twins.images(n) for n in (2, 5, 1)], {0: Dim('batch')})


@quietly
@capability('`torch.export`, dynamic batch and resolution', slow=True)
def test_export_resolution(twins: Twins) -> None:
    step = 64 if twins.name == 'maxvit' else 32  # whose grids need a multiple
    axes = {0: Dim('batch'), 2: step * Dim('rows', min=2, max=8), 3: step * Dim('columns', min=2, max=8)}
    check_export(twins, [torch.randn(n, 3, step * n, step * (n + 1)) for n in (2, 3, 4)], axes)


def check_export(twins: Twins, inputs: list[Tensor], axes: dict[int, Any]) -> None:
    model = twins.moved()
    try:
        found = exported(model, inputs, axes)
    except Exception:
        with unpatched():
            exported(twins.base, inputs, axes)
        raise
    assert_close(found, [outputs(model, images) for images in inputs], rtol=1e-4, scale=1e-5)


def exported(model: nn.Module, inputs: list[Tensor], axes: dict[int, Any]) -> list[Any]:
    with torch.no_grad():
        use = torch.export.export(model, (inputs[0],), dynamic_shapes=(axes,), strict=False).module()
        return [use(images) for images in inputs]


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # of sizes that are numbers in the trace
@pytest.mark.filterwarnings('ignore:`torch.jit:FutureWarning')  # it is deprecated
@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning')
@capability('`torch.jit.trace`')
def test_jit_trace(twins: Twins) -> None:
    images, model = twins.images(), twins.moved()
    with unpatched():
        torch.jit.trace(twins.base, images)
    found = torch.jit.trace(model, images)  # which compares a second trace with the first, and what both compute
    assert_close(outputs(found, images), outputs(model, images), rtol=1e-4, scale=1e-5)


@capability('ONNX (`torch.onnx.export`, run by onnxruntime), dynamic batch', slow=True)
def test_onnx(twins: Twins, tmp_path: Path) -> None:
    model = twins.moved()
    inputs = [twins.images(n) for n in (2, 5, 1)]
    try:
        found = run_onnx(model, inputs, tmp_path / 'model.onnx')
    except Exception:
        with unpatched():
            run_onnx(twins.base, inputs, tmp_path / 'base.onnx')
        raise
    assert_close(found, [outputs(model, images) for images in inputs], rtol=1e-3, scale=1e-4)


def run_onnx(model: nn.Module, inputs: list[Tensor], path: Path) -> list[Any]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter warns of itself
        torch.onnx.export(
            model, (inputs[0],), str(path), dynamo=True, dynamic_shapes=({0: Dim('batch')},), verbose=False
        )
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (name,) = [each.name for each in session.get_inputs()]
    return [[torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})] for images in inputs]
