"""Creating variants: what reaches the base, what reaches the operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import is_exportable, is_scriptable
from timm.models import _registry as timm_registry
from timm.models import model_entrypoint
from torch import nn

import sem_timm
from sem_timm import OptionError
from tests.lively import lively
from tests.registry.models import BASES, assert_equal, gates, image, outputs, train
from tests.versions import building_weightless, since_timm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments and layer flags that the entry point of ``test_resnet`` is called with."""
    entrypoint = model_entrypoint('test_resnet')
    seen: list[dict[str, Any]] = []

    def spy(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        seen.append(dict(kwargs, pretrained=pretrained, scriptable=is_scriptable(), exportable=is_exportable()))
        kwargs.pop('cache_dir', None)
        return entrypoint(pretrained=False, **kwargs)

    monkeypatch.setitem(timm_registry._model_entrypoints, 'test_resnet', spy)
    return seen


def test_from_scratch_the_gates_start_as_published() -> None:
    model = timm.create_model('test_resnet_sem')
    assert gates(model) and {gate.form for gate in gates(model).values()} == {'paper'}
    assert sem_timm.patched_modules(model)


def test_patched_model_is_its_base_patched() -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_convnext_sem', sem_init='identity')
    torch.manual_seed(0)
    base = timm.create_model('test_convnext')
    assert type(model) is type(base)
    assert_equal(list(base.state_dict().values()), [model.state_dict()[name] for name in base.state_dict()])
    model.load_state_dict(lively(base).state_dict(), strict=False)  # layer scales start so small that they hide a gate
    assert_equal(outputs(model, image()), outputs(base, image()))
    assert gates(model).keys() == gates(sem_timm.patch_model(base)).keys()


def test_pretrained_variant_gives_the_logits_of_its_base(base_weights: Callable[..., str]) -> None:
    file = dict(file=base_weights('test_resnet'))
    base = timm.create_model('test_resnet', pretrained=True, pretrained_cfg_overlay=file)
    model = timm.create_model('test_resnet_sem', pretrained=True, pretrained_cfg_overlay=file)
    assert {gate.form for gate in gates(model).values()} == {'identity'}
    assert_equal(outputs(model, image()), outputs(base, image()))


def test_init_can_be_chosen(base_weights: Callable[..., str]) -> None:
    overlay = dict(file=base_weights('test_resnet'))
    paper = timm.create_model('test_resnet_sem', pretrained=True, pretrained_cfg_overlay=overlay, sem_init='paper')
    identity = timm.create_model('test_resnet_sem', sem_init='identity')
    assert {gate.form for gate in gates(paper).values()} == {'paper'}
    assert {gate.form for gate in gates(identity).values()} == {'identity'}


def test_arguments_reach_the_base(base_weights: Callable[..., str]) -> None:
    model = timm.create_model(
        'test_vit_sem', num_classes=7, in_chans=1, img_size=96, drop_rate=0.25, global_pool='avg', drop_path_rate=None
    )
    assert model.num_classes == 7 and model.head_drop.p == 0.25 and model.patch_embed.img_size == (96, 96)
    assert outputs(model, image(96, channels=1))[0].shape == (2, 7)
    overlay = dict(file=base_weights('test_vit'))
    small = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, img_size=96)
    torch.manual_seed(0)
    base = timm.create_model('test_vit', **small)
    torch.manual_seed(0)
    assert_equal(outputs(timm.create_model('test_vit_sem', **small), image(96, 1)), outputs(base, image(96, 1)))


def test_everything_else_is_passed_through(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    timm.create_model(
        'test_resnet_sem.r160_in1k',
        pretrained=True,
        cache_dir=tmp_path,
        scriptable=True,
        exportable=True,
        pretrained_strict=False,
        zero_init_last=False,
    )
    (call,) = calls
    assert call == dict(
        pretrained=True,
        pretrained_cfg='r160_in1k',
        pretrained_cfg_overlay={'architecture': 'test_resnet_sem'},
        cache_dir=tmp_path,
        scriptable=True,
        exportable=True,
        pretrained_strict=False,
        zero_init_last=False,
    )


def test_entrypoint_works_without_create_model() -> None:
    model = model_entrypoint('test_resnet_sem')(num_classes=3, sem_target=None)
    assert outputs(model, image())[0].shape == (2, 3)


@since_timm('1.0.31', 'resolve_model_input_args')
def test_arguments_of_timms_scripts_build_a_variant() -> None:
    from timm.models import resolve_model_input_args

    arguments = resolve_model_input_args('test_resnet_sem.r160_in1k', {'input_size': (1, 96, 96)}, sem_reduction=8)
    model = timm.create_model(**arguments)
    assert {gate.reduction for gate in gates(model).values()} == {8}
    assert model.pretrained_cfg['tag'] == 'r160_in1k' and outputs(model, image(channels=1))[0].shape == (2, 1000)


def test_checkpoint_of_a_variant_loads(tmp_path: Path) -> None:
    model = timm.create_model('test_resnet_sem')
    train(model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth')
    loaded = timm.create_model('test_resnet_sem', checkpoint_path=tmp_path / 'checkpoint.pth')
    assert_equal(outputs(loaded, image()), outputs(model, image()))


def test_pretrained_cfg_names_the_variant(base_weights: Callable[..., str]) -> None:
    assert timm.create_model('test_resnet_sem').pretrained_cfg['architecture'] == 'test_resnet_sem'
    overlay = dict(file=base_weights('test_resnet'))
    model = timm.create_model('test_resnet_sem.r160_in1k', pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg['architecture'] == 'test_resnet_sem'
    assert model.pretrained_cfg['tag'] == 'r160_in1k'
    assert model.pretrained_cfg['file'] == overlay['file']
    assert model.default_cfg is model.pretrained_cfg
    features = timm.create_model('test_resnet_sem', features_only=True)
    assert features.pretrained_cfg['architecture'] == 'test_resnet_sem'


def test_weights_that_do_not_exist_are_an_error_as_in_timm() -> None:
    name = next(name for name in BASES if not timm.models.is_model_pretrained(name))
    with building_weightless(), pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}_sem'):
        timm.create_model(f'{name}_sem', pretrained=True)
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(none_such\) for test_resnet_sem'):
        timm.create_model('test_resnet_sem.none_such', pretrained=True)
    with pytest.raises(FileNotFoundError):
        timm.create_model('test_resnet_sem', pretrained=True, pretrained_cfg_overlay=dict(file='none_such.pth'))


def test_options_reach_the_operation() -> None:
    model = timm.create_model(
        'test_resnet_sem',
        sem_target='layer[14].*',
        sem_exclude='layer4.*',
        sem_reduction=2,
        sem_operators=['se', 'lct'],
        sem_position='output',
        sem_input_size=[3, 96, 96],
    )
    ((name, gate),) = gates(model).items()
    assert name == 'layer1.0.sem' and gate.reduction == 2 and list(gate.operators) == ['se', 'lct']
    assert len(gates(timm.create_model('test_vit_sem', sem_branches='all'))) == 2 * len(
        gates(timm.create_model('test_vit_sem'))
    )


def test_unknown_option_is_an_error_that_lists_the_known() -> None:
    known = (
        'sem_target, sem_exclude, sem_input_size, sem_position, sem_branches, sem_reduction, sem_operators, sem_init, '
        'sem_decision'
    )
    with pytest.raises(OptionError, match=f"test_resnet_sem has no option 'sem_reducton'. There are: {known}."):
        timm.create_model('test_resnet_sem', sem_reducton=8)


@pytest.mark.parametrize('name', ['levit_128s_sem', 'levit_128s_ea', 'mvitv2_tiny_sem', 'mvitv2_tiny_ea'])
def test_variants_for_images_of_another_size_than_their_family_keeps(name: str) -> None:
    with torch.device('meta'):
        model = timm.create_model(name, img_size=128, in_chans=4)
    assert {part.input_size for part in sem_timm.patched_modules(model)} == {(4, 128, 128)}
    assert 'input_size' not in str(model._model_args)
    assert model(torch.empty(2, 4, 128, 128, device='meta')).shape == (2, 1000)
