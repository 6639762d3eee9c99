"""Models with patches that were trained, for the tests of patch files."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sem_timm
from tests.families import FAMILIES
from tests.twins import trained

# A family and the calls of patch_model; they differ in what is recorded and planned anew.
CASES: dict[str, tuple[str, list[tuple[Any, dict[str, Any]]]]] = {
    'sem': ('resnet', [('sem', {})]),
    'sem_without_decision': ('resnet', [('sem', {'decision': 'equal'})]),
    'sem_with_options': ('resnet', [('sem', {'reduction': 4, 'operators': ['ie', 'se', 'se'], 'init': 'paper'})]),
    'sem_on_the_last_block_of_a_sequence': ('resnet', [('sem', {'target': 'layer1'})]),
    'sem_on_outputs_and_branches': ('resnet', [('sem', {'target': ['layer1', 'layer2.0']})]),
    'sem_but_for_some': ('resnet', [('sem', {'exclude': ['layer1', 'layer4']})]),
    'sem_on_both_branches': ('vit_registers', [('sem', {'branches': 'all'})]),
    'sem_where_the_name_is_taken': ('regnet', [('se', {})]),
    'sem_with_channels_last': ('swin', [('sem', {})]),
    'sem_without_residuals': ('densenet', [('sem', {})]),
    'eca': ('efficientnet', [('eca', {})]),
    'timm_cbam': ('resnet', [('timm_cbam', {})]),
    'timm_lambda': ('resnet', [('timm_lambda', {'target': 'layer1.0'})]),
    'ssf': ('swin', [('ssf', {})]),
    'external2d': ('swin', [('external2d', {'memory': 8})]),
    'external': ('vit_registers', [('external', {'memory': 8})]),
    'external_in_windows': ('swin', [('external', {'memory': 8, 'norm': 'softmax'})]),
    'eamlp': ('vit_registers', [('eamlp', {'memory': 8, 'attn_drop': 0.25})]),
    'two_attentions_and_sem': (
        'vit_registers',
        [
            ('external', {'memory': 8, 'target': r'blocks\.[01]\.attn'}),
            ('linear', {'target': r'blocks\.2\.attn'}),
            ('sem', {'target': r'blocks\.[1-3]'}),
        ],
    ),
    'the_same_twice': ('resnet', [('sem', {'target': 'layer1.0'}), ('sem', {'target': 'layer3.0'})]),
}


def base(name: str = 'resnet', **options: Any) -> Any:
    return FAMILIES[name].create(**options)


def patch(model: nn.Module, *calls: tuple[Any, dict[str, Any]], input_size: tuple[int, ...] | None = None) -> Any:
    """Patches a model and gives the new modules weights that show."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        for operation, options in calls or [('sem', {})]:
            sem_timm.patch_model(model, operation, input_size=input_size, **options)
    return trained(model)


def of_case(case: str) -> Any:
    """A copy of the model of a case, which is patched once."""
    return copy.deepcopy(_of_case(case))


@functools.cache
def _of_case(case: str) -> Any:
    name, calls = CASES[case]
    return patch(base(name), *calls, input_size=FAMILIES[name].input_size)


def outputs(model: nn.Module, name: str = 'resnet') -> Tensor:
    images = FAMILIES[name].images()
    with torch.no_grad():
        out: Tensor = model.eval()(images.to(next(model.parameters()).dtype))
    return out


def edit_json(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Changes what patch.json says."""
    file = folder / 'patch.json'
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob('*.safetensors')
    return file


def swap_in(folder: Path, data: bytes) -> None:
    """Puts other bytes into the weights file, and makes patch.json agree about their hash."""
    weights_file(folder).write_bytes(data)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    edit_json(folder, lambda record: record['weights'].update(size=len(data), digest=digest))
