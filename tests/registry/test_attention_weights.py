"""Weights of variants with another attention: to disk and back, and whose they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_state_dict, model_entrypoint
from torch import nn

import sem_timm
from sem_timm import OptionError, SwapWarning
from tests.registry.models import assert_equal, image, outputs, train
from tests.versions import save_for_hf, saves_arguments

VARIANTS = ('ea', 'eamlp')


def fine_tuned(suffix: str = 'ea', base: str = 'test_vit', **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {f'{suffix}_memory': 8, f'{suffix}_target': r'blocks\.[0-2]\.attn'}
    model = timm.create_model(f'{base}_{suffix}', num_classes=5, **options, **kwargs)
    train(model)
    return model


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    return [(part.name, part.operation) for part in sem_timm.patched_modules(model)]


@saves_arguments
@pytest.mark.parametrize('safe', [False, True])
@pytest.mark.parametrize('suffix', VARIANTS)
def test_saved_variant_comes_back_with_its_options(tmp_path: Path, suffix: str, safe: bool) -> None:
    model = fine_tuned(suffix)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)  # trained weights: no warning
    assert attentions(loaded) == attentions(model) and len(attentions(model)) == 3
    assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))
    assert_equal(
        outputs(sem_timm.unpatch_model(loaded), image(160)), outputs(sem_timm.unpatch_model(model), image(160))
    )
    assert loaded.pretrained_cfg['architecture'] == f'test_vit_{suffix}'
    assert loaded.pretrained_cfg['source'] == 'local-dir' and 'state_dict' not in loaded.pretrained_cfg
    untrained = timm.create_model(f'local-dir:{tmp_path}')
    assert attentions(untrained) and untrained.num_classes == 5


@saves_arguments
def test_saved_variant_comes_back_twice(tmp_path: Path) -> None:
    model = fine_tuned(ea_norm='softmax')
    save_for_hf(model, tmp_path / 'one')
    save_for_hf(timm.create_model(f'local-dir:{tmp_path / "one"}', pretrained=True), tmp_path / 'two')
    loaded = timm.create_model(f'local-dir:{tmp_path / "two"}', pretrained=True)
    assert attentions(loaded) == attentions(model)
    assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))


@saves_arguments
@pytest.mark.parametrize('suffix', VARIANTS)
def test_saved_variant_fits_other_classes_channels_and_sizes(tmp_path: Path, suffix: str) -> None:
    model = fine_tuned(suffix)
    save_for_hf(model, tmp_path)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, in_chans=1, img_size=96)
    assert outputs(other, image(96, 1))[0].shape == (2, 3)
    weights = model.state_dict()
    blocks = {key: value for key, value in other.state_dict().items() if key.startswith('blocks.')}
    assert blocks and all(torch.equal(value, weights[key]) for key, value in blocks.items())


@saves_arguments
@pytest.mark.parametrize('suffix', VARIANTS)
def test_saved_variant_makes_a_feature_backbone(tmp_path: Path, suffix: str) -> None:
    model = fine_tuned(suffix)
    save_for_hf(model, tmp_path)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True)
    whole = model.state_dict()
    new = {key: value for key, value in features.state_dict().items() if '.core.' in key}
    assert len(new) == sum('.core.' in key for key in whole)
    assert all('state_dict' not in getattr(module, 'pretrained_cfg', ()) for module in features.modules())
    assert all(torch.equal(value, whole[key.removeprefix('model.')]) for key, value in new.items())


def test_keys_decide_whose_weights_a_file_holds(tmp_path: Path) -> None:
    model = fine_tuned()
    torch.save(model.state_dict(), tmp_path / 'variant.pth')
    kwargs: dict[str, Any] = dict(pretrained=True, num_classes=5, ea_memory=8, ea_target=r'blocks\.[0-2]\.attn')
    weights = load_state_dict(str(tmp_path / 'variant.pth'))
    for overlay in (dict(file=str(tmp_path / 'variant.pth')), dict(state_dict=weights)):
        overlay['num_classes'] = 5
        for cfg in (None, timm.models.get_pretrained_cfg('test_vit_ea')):
            loaded = timm.create_model('test_vit_ea', pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
            assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))
            assert 'state_dict' not in loaded.pretrained_cfg


def test_hub_model_of_a_variant_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``create_model('hf-hub:user/model')`` calls the entry point, with the download left out."""
    model = fine_tuned()
    monkeypatch.setattr('sem_timm.registry.weights.load_state_dict_from_hf', lambda *args, **kwargs: model.state_dict())
    cfg = dict(model.pretrained_cfg, source='hf-hub', hf_hub_id='user/model', num_classes=5)
    loaded = model_entrypoint('test_vit_ea')(pretrained=True, pretrained_cfg=cfg, **model._model_args)
    assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))
    assert loaded.pretrained_cfg['source'] == 'hf-hub' and 'state_dict' not in loaded.pretrained_cfg


@saves_arguments
@pytest.mark.parametrize('suffix', VARIANTS)
def test_saved_variant_without_its_modules_is_refused(tmp_path: Path, suffix: str) -> None:
    model: Any = sem_timm.unpatch_model(fine_tuned(suffix))
    save_for_hf(model, tmp_path)
    with pytest.raises(OptionError, match=rf'(?s)says that it is test_vit_{suffix}.*create_model\(.test_vit.'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    with pytest.warns(SwapWarning, match='has the weights of test_vit'):
        lenient = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, pretrained_strict=False)
    assert_equal(outputs(sem_timm.unpatch_model(lenient), image(160)), outputs(model, image(160)))


@saves_arguments
def test_saved_variant_without_weights_of_its_own_comes_back_without_a_warning(
    tmp_path: Path, registrations: None
) -> None:
    sem_timm.register_variants('linear')
    torch.manual_seed(0)
    model = timm.create_model('test_vit_linear', num_classes=5)
    train(model)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))


def test_folder_with_base_weights_serves_a_variant(tmp_path: Path) -> None:
    base = timm.create_model('test_vit', num_classes=5)
    save_for_hf(base, tmp_path)
    overlay = dict(source='local-dir', file=str(tmp_path), num_classes=5)
    with pytest.warns(SwapWarning, match='test_vit_ea has the weights of test_vit') as caught:
        model = timm.create_model('test_vit_ea', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert len(caught) == 1 and len(attentions(model)) == 6
    assert_equal(outputs(sem_timm.unpatch_model(model), image(160)), outputs(base, image(160)))


@saves_arguments
@pytest.mark.parametrize('suffix', VARIANTS)
def test_weights_of_other_options_are_an_error(tmp_path: Path, suffix: str) -> None:
    save_for_hf(fine_tuned(suffix), tmp_path)
    for option in ({f'{suffix}_target': 'blocks.1.attn'}, {f'{suffix}_memory': 16}):
        with pytest.raises(OptionError, match=f'trained with other options(.|\n)*such as {suffix}_target=') as caught:
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **option)
        assert '(blocks.' in str(caught.value)
    with pytest.raises(OptionError, match='have another shape'):  # which no strictness can mend
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, pretrained_strict=False, **{f'{suffix}_memory': 16})
    lenient = {f'{suffix}_target': 'blocks.1.attn', 'pretrained_strict': False}
    (attention,) = attentions(timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **lenient))
    assert attention[0] == 'blocks.1.attn'


def test_variants_of_two_attentions_do_not_take_each_others_weights(tmp_path: Path) -> None:
    torch.save(fine_tuned('eamlp').state_dict(), tmp_path / 'variant.pth')
    overlay = dict(file=str(tmp_path / 'variant.pth'), num_classes=5)
    kwargs: dict[str, Any] = dict(pretrained=True, num_classes=5, ea_target=r'blocks\.[0-2]\.attn')
    with pytest.raises(OptionError, match='trained with other options'):
        timm.create_model('test_vit_ea', pretrained_cfg_overlay=overlay, **kwargs)


@saves_arguments
def test_shared_slots_of_windows_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(embed_dim=24, depths=[2, 2, 2, 2], num_classes=3, img_size=128, window_size=4)
    model = timm.create_model('swin_tiny_patch4_window7_224_ea', **options)
    train(model)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_equal(outputs(loaded, image(128)), outputs(model, image(128)))


def test_parameters_that_are_no_longer_read_are_frozen_in_variants(base_weights: Callable[..., str]) -> None:
    overlay = dict(file=base_weights('test_vit_relpos'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)
        model = timm.create_model('test_vit_relpos_ea', pretrained=True, pretrained_cfg_overlay=overlay)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all('rel_pos' in name for name in frozen)
    model(image(160)).sum().backward()
    assert all(p.grad is not None for p in sem_timm.trainable_parameters(model))
