"""Patch files and timm's registry: variants, saved folders and feature backbones."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import sem_timm
from sem_timm import ModelError
from sem_timm.registry import base_architecture
from tests.refusals import refused
from tests.registry.models import image, train
from tests.twins import trained
from tests.versions import save_for_hf, saves_arguments


def pair(variant: str, **options: Any) -> tuple[Any, Any]:
    """A base and its trained variant with the same base weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = timm.create_model(base_architecture(variant), num_classes=5).eval()
        train(base)
        model = timm.create_model(variant, num_classes=5, **options).eval()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', sem_timm.SwapWarning)
            model.load_state_dict(base.state_dict(), strict=False)
        generator = torch.Generator().manual_seed(1)
        for part in sem_timm.patched_modules(model):
            for child in part.inserted:
                for parameter in model.get_submodule(f'{part.name}.{child}').parameters():
                    nn.init.normal_(parameter, std=0.3, generator=generator)
    return base, model


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(image(160))
    return out


VARIANTS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    (
        'test_resnet_sem',
        {'sem_reduction': 8, 'sem_target': 'layer2.0'},
        'sem',
        {'reduction': 8, 'target': 'layer2.0'},
    ),
    ('test_vit_ea', {'ea_memory': 8}, 'external', {'memory': 8}),
    ('test_vit_eamlp', {'eamlp_memory': 8}, 'eamlp', {'memory': 8}),
]
each = pytest.mark.parametrize('variant, options, operation, own', VARIANTS, ids=[v[0] for v in VARIANTS])


@each
def test_patch_of_a_variant_fits_the_base(
    tmp_path: Path, variant: str, options: dict[str, Any], operation: str, own: dict[str, Any]
) -> None:
    base, model = pair(variant, **options)
    sem_timm.save_patch(model, tmp_path)
    sem_timm.load_patch(base, tmp_path, check_base='error')
    assert torch.equal(run(base), run(model))


@saves_arguments
@each
def test_patch_of_a_base_fits_its_variant_and_goes_on_through_timm(
    tmp_path: Path, variant: str, options: dict[str, Any], operation: str, own: dict[str, Any]
) -> None:
    base, fresh = pair(variant, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        model = sem_timm.patch_model(copy.deepcopy(base), operation, **own)
    train(model)
    sem_timm.save_patch(model, tmp_path / 'patch', include_head=True, base=base, include_changed_base=True)
    sem_timm.load_patch(fresh, tmp_path / 'patch', check_base='error')
    assert torch.equal(run(fresh), run(model))
    save_for_hf(fresh, tmp_path / 'folder')
    loaded: Any = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
    assert torch.equal(run(loaded), run(model))
    sem_timm.save_patch(loaded, tmp_path / 'again')
    sem_timm.unpatch_model(model)
    assert torch.equal(run(sem_timm.load_patch(model, tmp_path / 'again', check_base='error')), run(loaded))


def test_variant_with_other_options_is_no_place_for_a_patch(tmp_path: Path) -> None:
    _, model = pair('test_resnet_sem', sem_operators=('se', 'ie'))
    sem_timm.save_patch(model, tmp_path)
    _, other = pair('test_resnet_sem')
    difference = "layer1.0.sem has operators=['se', 'eca', 'ie'] here and ['se', 'ie'] there"
    with refused(other, ModelError, 'patched already', 'sem at 4 sites here', difference, 'unpatch_model(model) first'):
        sem_timm.load_patch(other, tmp_path)
    _, fewer = pair('test_resnet_sem', sem_target='layer2.0')
    with refused(fewer, ModelError, 'sem at 1 sites here', 'layer1.0.sem is only there'):
        sem_timm.load_patch(fewer, tmp_path)


SPELT: list[tuple[str, str, dict[str, Any]]] = [
    ('test_resnet_sem', 'sem', {'position': 'residual', 'branches': 'all'}),
    ('test_vit_ea', 'external', {'memory': 64}),
    ('test_vit_eamlp', 'eamlp', {'memory': 64}),
]


@pytest.mark.parametrize('variant, operation, default', SPELT, ids=[case[0] for case in SPELT])
def test_options_that_change_nothing_are_no_difference(
    tmp_path: Path, variant: str, operation: str, default: dict[str, Any]
) -> None:
    base, fresh = pair(variant)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        trained(sem_timm.patch_model(base, operation, **default))
    sem_timm.save_patch(base, tmp_path)
    sem_timm.load_patch(fresh, tmp_path, check_base='error')
    assert torch.equal(run(fresh), run(base))


def test_feature_backbones(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        features = [timm.create_model('test_resnet_sem', features_only=True) for _ in range(2)]
        train(features[0])
    sem_timm.save_patch(features[0], tmp_path, base=features[1], include_changed_base=True)
    sem_timm.load_patch(features[1], tmp_path, check_base='error')
    x = image(64)
    assert all(torch.equal(a, b) for a, b in zip(features[0].eval()(x), features[1].eval()(x), strict=True))


def test_base_architectures() -> None:
    names = {
        'resnet50_sem': 'resnet50',
        'vit_base_patch16_224_ea': 'vit_base_patch16_224',
        'vit_base_patch16_224_eamlp': 'vit_base_patch16_224',
        'resnet50': 'resnet50',
        'no_model_sem': 'no_model_sem',
    }
    assert {name: base_architecture(name) for name in names} == names
