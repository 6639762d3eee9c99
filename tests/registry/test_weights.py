"""Weights of variants: to disk and back, and whose they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_state_dict, model_entrypoint
from torch import nn

import sem_timm
from sem_timm import OptionError
from tests.registry.models import assert_equal, gates, image, outputs, train
from tests.versions import save_for_hf, saves_arguments, since_timm


def fine_tuned(name: str = 'test_resnet_sem', **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, sem_operators=('se', 'ie'), sem_reduction=4, **kwargs)
    train(model)
    return model


@saves_arguments
@pytest.mark.parametrize('safe', [False, True])
@pytest.mark.parametrize('init', ['identity', 'paper'])
def test_saved_variant_comes_back_with_its_options(tmp_path: Path, init: str, safe: bool) -> None:
    model = fine_tuned(sem_target='layer[24].*', sem_init=init)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert {gate.form for gate in gates(loaded).values()} == {init}
    assert gates(loaded).keys() == gates(model).keys()
    assert_equal(outputs(loaded, image()), outputs(model, image()))
    assert loaded.pretrained_cfg['architecture'] == 'test_resnet_sem'
    assert loaded.pretrained_cfg['source'] == 'local-dir' and 'state_dict' not in loaded.pretrained_cfg
    untrained = timm.create_model(f'local-dir:{tmp_path}')
    assert untrained.state_dict().keys() == model.state_dict().keys() and untrained.num_classes == 5


@saves_arguments
def test_default_init_comes_back_too(tmp_path: Path, base_weights: Callable[..., str]) -> None:
    """The form of the gates is no matter of chance, though the defaults with and without weights differ."""
    overlay = dict(file=base_weights('test_resnet'))
    for kwargs in ({}, dict(pretrained=True, pretrained_cfg_overlay=overlay)):
        model = fine_tuned(**kwargs)
        save_for_hf(model, tmp_path)
        for pretrained in (True, False):
            loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained)
            assert {g.form for g in gates(loaded).values()} == {g.form for g in gates(model).values()}


@saves_arguments
def test_saved_variant_comes_back_twice(tmp_path: Path) -> None:
    model = fine_tuned()
    save_for_hf(model, tmp_path / 'one')
    save_for_hf(timm.create_model(f'local-dir:{tmp_path / "one"}', pretrained=True), tmp_path / 'two')
    loaded = timm.create_model(f'local-dir:{tmp_path / "two"}', pretrained=True)
    assert_equal(outputs(loaded, image()), outputs(model, image()))


@saves_arguments
def test_saved_variant_fits_other_classes_channels_and_sizes(tmp_path: Path) -> None:
    model = fine_tuned('test_vit_sem')
    save_for_hf(model, tmp_path)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, in_chans=1, img_size=96)
    assert outputs(other, image(96, 1))[0].shape == (2, 3)
    for name, gate in gates(other).items():
        assert_equal(list(gate.parameters()), list(gates(model)[name].parameters()))
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


@saves_arguments
@pytest.mark.parametrize('base', ['test_resnet', 'test_efficientnet', 'test_vit'])
def test_saved_variant_makes_a_feature_backbone(tmp_path: Path, base: str) -> None:
    model = fine_tuned(f'{base}_sem')
    save_for_hf(model, tmp_path)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True)
    whole = model.state_dict()
    inserted = {key: value for key, value in features.state_dict().items() if '.sem.' in key}
    assert inserted
    assert all('state_dict' not in getattr(module, 'pretrained_cfg', ()) for module in features.modules())
    assert all(torch.equal(value, whole[key.removeprefix('model.')]) for key, value in inserted.items())


def test_keys_decide_whose_weights_a_file_holds(tmp_path: Path) -> None:
    model = fine_tuned(sem_init='identity')
    torch.save(model.state_dict(), tmp_path / 'variant.pth')
    kwargs: dict[str, Any] = dict(pretrained=True, num_classes=5, sem_operators=('se', 'ie'), sem_reduction=4)
    weights = load_state_dict(str(tmp_path / 'variant.pth'))
    for overlay in (dict(file=str(tmp_path / 'variant.pth')), dict(state_dict=weights)):
        overlay['num_classes'] = 5
        loaded = timm.create_model('test_resnet_sem', pretrained_cfg_overlay=overlay, **kwargs)
        assert_equal(outputs(loaded, image()), outputs(model, image()))
        assert 'state_dict' not in loaded.pretrained_cfg
    cfg = timm.models.get_pretrained_cfg('test_resnet_sem')
    overlay = dict(file=str(tmp_path / 'variant.pth'), num_classes=5)
    loaded = timm.create_model('test_resnet_sem', pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
    assert_equal(outputs(loaded, image()), outputs(model, image()))


def test_hub_model_of_a_variant_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``create_model('hf-hub:user/model')`` calls the entry point, with the download left out."""
    model = fine_tuned()
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        asked.append((*args, kwargs))
        return model.state_dict()

    monkeypatch.setattr('sem_timm.registry.weights.load_state_dict_from_hf', load)
    loaded = model_entrypoint('test_resnet_sem')(
        pretrained=True,
        pretrained_cfg=dict(source='hf-hub', hf_hub_id='user/model', num_classes=5),
        cache_dir=tmp_path,
        **model._model_args,
    )
    assert asked == [('user/model', 'pytorch_model.bin', dict(cache_dir=tmp_path))]
    assert_equal(outputs(loaded, image()), outputs(model, image()))
    assert loaded.pretrained_cfg['source'] == 'hf-hub' and 'state_dict' not in loaded.pretrained_cfg


@saves_arguments
def test_saved_variant_without_its_modules_is_refused(tmp_path: Path) -> None:
    """Its record says that it is a variant, and its weights are those of a base."""
    model: Any = sem_timm.unpatch_model(fine_tuned())
    save_for_hf(model, tmp_path / 'unpatched')
    save_for_hf(sem_timm.patch_model(copy.deepcopy(model), 'eca'), tmp_path / 'otherwise')
    for folder in ('unpatched', 'otherwise'):
        with pytest.raises(OptionError, match=r'(?s)says that it is test_resnet_sem.*create_model\(.test_resnet.'):
            timm.create_model(f'local-dir:{tmp_path / folder}', pretrained=True)
    assert gates(timm.create_model(f'local-dir:{tmp_path / "unpatched"}'))


@since_timm('1.0.16', 'models of local-dir:')
def test_folder_with_base_weights_serves_a_variant(tmp_path: Path) -> None:
    """As the error above says."""
    base: Any = sem_timm.unpatch_model(fine_tuned())
    save_for_hf(base, tmp_path)
    overlay = dict(source='local-dir', file=str(tmp_path), num_classes=5)
    for name, count in (('test_resnet', 0), ('test_resnet_sem', 4)):
        model = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
        assert len(gates(model)) == count
        assert_equal(outputs(model, image()), outputs(base, image()))


@saves_arguments
def test_weights_of_other_options_are_an_error(tmp_path: Path) -> None:
    save_for_hf(fine_tuned(), tmp_path)
    with pytest.raises(OptionError, match='trained with other options'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, sem_target='layer1.*')
    with pytest.raises(OptionError, match='trained with other options'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, sem_operators=('eca',))
    lenient = dict(pretrained=True, pretrained_strict=False, sem_target='layer1.*')
    assert gates(timm.create_model(f'local-dir:{tmp_path}', **lenient)).keys() == {'layer1.0.sem'}


@saves_arguments
def test_options_without_a_place_in_json_are_refused_by_timm(tmp_path: Path) -> None:
    model = timm.create_model('test_resnet_sem', sem_target=lambda name, module: name == 'layer1.0')
    with pytest.raises(ValueError, match='sem_target'):
        save_for_hf(model, tmp_path)
    save_for_hf(model, tmp_path, model_args=dict(sem_target='layer1.0'))
    assert gates(timm.create_model(f'local-dir:{tmp_path}', pretrained=True)).keys() == gates(model).keys()
