"""The variants with one of timm's own attentions, which are registered on request."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import is_model

import sem_timm
from sem_timm import OptionError, SwapWarning, TimmAttentionConfig
from sem_timm.registry import base_architecture
from tests.registry.models import BASES
from tests.versions import save_for_hf, weightless


def test_they_are_there_for_every_architecture_and_claim_no_weights(registrations: None) -> None:
    assert not is_model('resnet50_timm_cbam')
    sem_timm.register_variants('timm_cbam')
    assert {name.removesuffix('_timm_cbam') for name in timm.list_models('*_timm_cbam')} == set(BASES)
    assert timm.list_pretrained('*_timm_cbam') == []
    assert base_architecture('vit_tiny_patch16_224_timm_cbam') == 'vit_tiny_patch16_224'


def test_options_have_the_prefix_of_the_operation(registrations: None) -> None:
    sem_timm.register_variants('timm_cbam')
    options = {'timm_cbam_target': r'layer4\..*', 'timm_cbam_position': 'output'}
    model = weightless('test_resnet_timm_cbam', **options)
    records = sem_timm.patched_modules(model)
    assert {record.name for record in records} == {'layer4.0'}
    assert {record.operation for record in records} == {TimmAttentionConfig('cbam', position='output')}
    for name in ('timm_cbam_memory', 'timm_cbam_name'):
        with pytest.raises(OptionError, match=r'(?s)test_resnet_timm_cbam: option .* the prefix timm_cbam_'):
            weightless('test_resnet_timm_cbam', **{name: 3})


@pytest.mark.parametrize('name', ['se', 'timm_bat', 'cbam', 'external2d'])
def test_other_operations_make_no_variants(name: str) -> None:
    with pytest.raises(OptionError, match=f"no variants can be registered for '{name}'"):
        sem_timm.register_variants(name)


@pytest.mark.parametrize(('base', 'operation'), [('test_resnet', 'timm_cbam'), ('test_efficientnet', 'timm_se')])
def test_weights_of_the_base_are_loaded_with_a_warning(
    base: str, operation: str, base_weights: Callable[..., str], registrations: None
) -> None:
    """The efficient network has modules named ``se`` of its own."""
    sem_timm.register_variants(operation)
    name, weights = f'{base}_{operation}', base_weights(base)
    with pytest.warns(SwapWarning, match=rf'{name} has the weights of {base} but for .*\({operation}\)'):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': weights})
    expected = torch.load(weights, weights_only=True)
    found = sem_timm.unpatch_model(model).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_saved_variant_comes_back(tmp_path: Path, registrations: None) -> None:
    sem_timm.register_variants('timm_se')
    model = timm.create_model('test_efficientnet_timm_se', num_classes=3).eval()
    save_for_hf(model, tmp_path, model_config={'num_classes': 3})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
