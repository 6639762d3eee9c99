"""Every attention and gate through both exporters to ONNX and through `torch.jit.trace`; the numbers are compared.

Optimisers tell axes by their sizes, so a batch is as large as the number of heads, of windows, of tokens, or of the
channels of a head.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from torch import Tensor, nn
from torch.export import Dim

import sem_timm
from sem_timm.layers import attention_core_class, attention_core_names, attention_names, excitation_names
from tests.compatibility.twins import assert_close
from tests.families import Family
from tests.layers.attention_inputs import trained
from tests.outputs import outputs
from tests.thorough import first_of_each
from tests.versions import since_torch

TINY: dict[str, Any] = {'depth': 1, 'embed_dim': 24, 'num_heads': 3, 'img_size': 48}
MODELS = {
    # Three heads of eight channels, nine patches and a class token.
    'vit': Family('test_vit', 48, TINY),
    'registers': Family('test_vit', 48, {**TINY, 'reg_tokens': 4, 'dynamic_img_size': True}),
    # Four windows of sixteen tokens with four heads, then one window with eight heads.
    'swin': Family(
        'swin_tiny_patch4_window7_224',
        32,
        {'img_size': 32, 'window_size': 4, 'embed_dim': 32, 'depths': (2, 1), 'num_heads': (4, 8)},
    ),
    'resnet': Family('test_resnet', 32),
}
BATCHES = {'vit': (3, 1, 2, 8, 10), 'registers': (3, 1, 14), 'swin': (1, 8, 16), 'resnet': (2, 1, 32)}
OPTIONS: dict[str, dict[str, Any]] = {
    'external': {'memory': 5},
    'eamlp': {'memory': 5},
    'halo': {'block_size': 2, 'halo_size': 1},
    'catt': {'dictionary': 5},
}
GATES = ('sem', *excitation_names())
PAIRS = [
    *((name, model) for model in ('vit', 'swin', 'registers') for name in attention_names()),
    *((name, model) for model in ('resnet', 'registers') for name in GATES),
    ('external2d', 'resnet'),
]
EVERY = (GraphOptimizationLevel.ORT_DISABLE_ALL, GraphOptimizationLevel.ORT_ENABLE_ALL)

pytestmark = [
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),  # of sizes that are numbers in the trace
    pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning'),  # it is deprecated
    pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning'),
    pytest.mark.filterwarnings('ignore:.*export:DeprecationWarning'),
]


def patched(name: str, model: str) -> nn.Module:
    """A small model with an operation, whose new parameters are all away from their initial values."""
    base = MODELS[model].create()
    known = {key for key, _ in base.named_parameters()}
    options = OPTIONS.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        changed: nn.Module = sem_timm.patch_model(base, name, input_size=MODELS[model].input_size, **options)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in changed.named_parameters():
        if key not in known:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return changed


def export(model: nn.Module, images: Tensor, path: Path, dynamo: bool, free: dict[int, str], optimize: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporters warn of themselves
        if dynamo:
            sizes = {axis: Dim(name) if axis == 0 else 16 * Dim(name, min=2, max=9) for axis, name in free.items()}
            shapes: Any = (sizes,) if free else None
            torch.onnx.export(
                model, (images,), str(path), input_names=['x'], dynamo=True, dynamic_shapes=shapes, optimize=optimize,
                verbose=False,
            )  # fmt: skip
        else:
            torch.onnx.export(
                model, (images,), str(path), input_names=['x'], dynamo=False, dynamic_axes={'x': free},
                do_constant_folding=optimize, opset_version=17,
            )  # fmt: skip


def check(
    model: nn.Module,
    inputs: list[Tensor],
    path: Path,
    dynamo: bool,
    free: dict[int, str] | None = None,
    optimize: bool = True,
) -> None:
    """Exports with the first input, and compares what onnxruntime makes of all of them, optimised or not."""
    export(model, inputs[0], path, dynamo, free or {}, optimize)
    for level in EVERY:
        options = SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        session = InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        found = [torch.from_numpy(session.run(None, {'x': images.numpy()})[0]) for images in inputs]
        assert_close(found, [outputs(model, images) for images in inputs], rtol=1e-3, scale=1e-5)


# The sizes that could be taken for each other are those of attention.
FIXED = [
    (name, model, batch)
    for name, model in PAIRS
    for batch in BATCHES[model][: None if name in attention_names() and model != 'registers' else 1]
]


@pytest.mark.parametrize(
    ('name', 'model', 'batch'),
    first_of_each(FIXED, lambda name, model, batch: name if name in attention_names() else None),
)
def test_the_older_exporter_with_a_fixed_batch(name: str, model: str, batch: int, tmp_path: Path) -> None:
    check(patched(name, model), [MODELS[model].images(batch)], tmp_path / 'model.onnx', dynamo=False)


@pytest.mark.parametrize(('name', 'model'), first_of_each(PAIRS, lambda name, model: name in attention_names()))
def test_the_older_exporter_with_any_batch(name: str, model: str, tmp_path: Path) -> None:
    inputs = [MODELS[model].images(batch) for batch in (2, 5, 1)]
    check(patched(name, model), inputs, tmp_path / 'model.onnx', dynamo=False, free={0: 'batch'})


# The newer exporter takes seconds, so that of each pair only the batch that equals the number of heads is tried, or
# of windows.
NEWER = [(name, model, BATCHES[model][0]) for name, model in PAIRS if model in ('vit', 'swin', 'resnet')]


@since_torch('2.5', 'dynamic_shapes of torch.onnx.export')
@pytest.mark.parametrize(('name', 'model', 'batch'), first_of_each(NEWER))
def test_the_newer_exporter_with_a_fixed_batch(name: str, model: str, batch: int, tmp_path: Path) -> None:
    check(patched(name, model), [MODELS[model].images(batch)], tmp_path / 'model.onnx', dynamo=True)


@pytest.mark.thorough
@pytest.mark.parametrize(('name', 'batch'), [('external', 8), ('external', 16), ('halo', 8), ('eamlp', 8)])
def test_the_newer_exporter_with_windows_of_as_many_heads(name: str, batch: int, tmp_path: Path) -> None:
    check(patched(name, 'swin'), [MODELS['swin'].images(batch)], tmp_path / 'model.onnx', dynamo=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ('name', 'dynamo'),
    [*((name, False) for name in attention_names()), ('external', True), ('halo', True), ('monarch', True)],
)
def test_exporters_without_their_optimisation(name: str, dynamo: bool, tmp_path: Path) -> None:
    check(patched(name, 'vit'), [MODELS['vit'].images(3)], tmp_path / 'model.onnx', dynamo, optimize=False)


# Which tokens are neighbours is told by their number; so an export with a grid is for images of one size.
ANY_SIZE = [name for name in attention_core_names() if name not in ('halo', 'monarch')]


@pytest.mark.parametrize(
    ('name', 'options'), [*((name, OPTIONS.get(name, {})) for name in ANY_SIZE), ('linear', {'centre_keys': True})]
)
def test_the_older_exporter_of_a_core_with_any_number_of_tokens(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    core = trained(attention_core_class(name)(8, num_heads=3, **options)).eval()
    path, names = tmp_path / 'core.onnx', ['q', 'k', 'v'] if core.reads_keys else ['q']
    sizes = ((2, 10), (3, 17), (1, 4))
    inputs = [[torch.randn(batch, 3, tokens, 8) for _ in names] for batch, tokens in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            core, tuple(inputs[0]), str(path), input_names=names, dynamo=False, opset_version=17,
            dynamic_axes={each: {0: 'batch', 2: 'tokens'} for each in names},
        )  # fmt: skip
    session = InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for given in inputs:
        (found,) = session.run(None, {each: x.numpy() for each, x in zip(names, given)})
        assert_close(torch.from_numpy(found), outputs(core, *given), rtol=1e-3, scale=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize('name', ['linear', 'external', 'efficient', 'eamlp'])
def test_the_newer_exporter_with_any_batch_and_size(name: str, tmp_path: Path) -> None:
    inputs = [torch.randn(n, 3, 16 * (n + 1), 16 * (n + 2)) for n in (2, 4, 1)]
    inputs[2] = torch.randn(1, 3, 48, 48)
    free = {0: 'batch', 2: 'rows', 3: 'columns'}
    check(patched(name, 'registers'), inputs, tmp_path / 'model.onnx', dynamo=True, free=free)


@pytest.mark.parametrize(
    ('name', 'model'), first_of_each(PAIRS, lambda name, model: name if name in attention_names() else None)
)
def test_a_trace_with_gradients_serves_other_batches(name: str, model: str) -> None:
    changed = patched(name, model)
    traced = torch.jit.trace(changed, MODELS[model].images(2))  # which compares it with a second trace, in eager mode
    for batch in (2, 5, 1):
        images = MODELS[model].images(batch)
        assert_close(traced(images), changed(images), scale=1e-6)
