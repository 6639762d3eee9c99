"""Creating variants with another attention: what reaches the base, what reaches the attention, and what is said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import nn

import sem_timm
from sem_timm import ExternalAttention, MultiHeadExternalAttention, OptionError, SwapWarning
from tests.registry.models import BASES, assert_equal, image, outputs, train
from tests.thorough import first_of_each
from tests.versions import building_weightless, since_timm, weightless

VARIANTS = {'ea': ('external', ExternalAttention), 'eamlp': ('eamlp', MultiHeadExternalAttention)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that the entry point of ``test_vit`` is called with."""
    entrypoint = model_entrypoint('test_vit')
    seen: list[dict[str, Any]] = []

    def spy(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        seen.append(dict(kwargs, pretrained=pretrained))
        return entrypoint(pretrained=False, **kwargs)

    monkeypatch.setitem(timm_registry._model_entrypoints, 'test_vit', spy)
    return seen


def cores(model: nn.Module) -> dict[str, nn.Module]:
    classes = (ExternalAttention, MultiHeadExternalAttention)
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def create(name: str, **kwargs: Any) -> tuple[nn.Module, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = timm.create_model(name, **kwargs)
    return model, caught


@pytest.mark.parametrize('suffix', VARIANTS)
def test_variant_is_its_base_patched(suffix: str) -> None:
    operation, layer = VARIANTS[suffix]
    torch.manual_seed(0)
    model = timm.create_model(f'test_vit_{suffix}')
    torch.manual_seed(0)
    base = timm.create_model('test_vit')
    unpatched = outputs(base, image(160))
    with pytest.warns(SwapWarning):
        sem_timm.patch_model(base, operation)
    assert type(model) is type(base) and list(model.state_dict()) == list(base.state_dict())
    assert len(cores(model)) == 6 and {type(core) for core in cores(model).values()} == {layer}
    assert {part.operation for part in sem_timm.patched_modules(model)} == {sem_timm.AttentionConfig(operation)}
    assert_equal(outputs(model, image(160)), outputs(base, image(160)))
    assert_equal(outputs(sem_timm.unpatch_model(model), image(160)), unpatched)


@pytest.mark.parametrize('suffix', VARIANTS)
def test_pretrained_variant_has_all_weights_of_its_base_and_says_once_what_is_new(
    suffix: str, base_weights: Callable[..., str]
) -> None:
    overlay = dict(file=base_weights('test_vit'))
    base = timm.create_model('test_vit', pretrained=True, pretrained_cfg_overlay=overlay)
    for name in (f'test_vit_{suffix}', f'test_vit_{suffix}.r160_in1k'):
        model, caught = create(name, pretrained=True, pretrained_cfg_overlay=overlay)
        (warning,) = caught
        assert warning.category is SwapWarning and warning.filename == __file__
        assert f'test_vit_{suffix} has the weights of test_vit but for its new attention' in str(warning.message)
        weights = model.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in base.state_dict().items())
        assert {key for key in weights if '.core.' not in key} == base.state_dict().keys()
        assert_equal(outputs(sem_timm.unpatch_model(model), image(160)), outputs(base, image(160)))


def test_weights_are_told_of_once_for_feature_backbones_too(base_weights: Callable[..., str]) -> None:
    overlay = dict(file=base_weights('test_vit'))
    model, caught = create('test_vit_ea', pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert [warning.category for warning in caught] == [SwapWarning] and caught[0].filename == __file__
    weights = timm.create_model('test_vit', pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    loaded = {key.removeprefix('model.'): value for key, value in model.state_dict().items() if '.core.' not in key}
    assert loaded and all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_an_error_for_warnings_comes_after_the_model(base_weights: Callable[..., str]) -> None:
    """The filters are those of the caller, before and after."""
    filters = list(warnings.filters)
    with pytest.raises(SwapWarning):  # pytest makes errors of warnings
        timm.create_model('test_vit_ea', pretrained=True, pretrained_cfg_overlay=dict(file=base_weights('test_vit')))
    assert warnings.filters == filters


def test_from_scratch_nothing_is_lost_and_nothing_said() -> None:
    for suffix in VARIANTS:
        assert create(f'test_vit_{suffix}')[1] == []


@pytest.mark.parametrize('suffix', VARIANTS)
def test_variant_is_made_without_memory(suffix: str) -> None:
    model = weightless(f'vit_small_patch16_224_{suffix}', dtype=torch.bfloat16)
    assert len(cores(model)) == 12
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    with torch.device('meta'):
        model = timm.create_model(f'vit_small_patch16_224_{suffix}')
    assert len(cores(model)) == 12 and {p.device.type for p in model.parameters()} == {'meta'}


def test_arguments_reach_the_base(base_weights: Callable[..., str]) -> None:
    arguments: dict[str, Any] = dict(num_classes=7, in_chans=1, img_size=96)
    scratch = timm.create_model('test_vit_ea', **arguments, drop_rate=0.25, global_pool='avg', drop_path_rate=None)
    assert scratch.num_classes == 7 and scratch.head_drop.p == 0.25 and scratch.patch_embed.img_size == (96, 96)
    assert outputs(scratch, image(96, channels=1))[0].shape == (2, 7)
    arguments.update(pretrained=True, pretrained_cfg_overlay=dict(file=base_weights('test_vit')))
    torch.manual_seed(0)
    base = timm.create_model('test_vit', **arguments)
    torch.manual_seed(0)
    model, _ = create('test_vit_ea', **arguments)
    assert_equal(outputs(sem_timm.unpatch_model(model), image(96, 1)), outputs(base, image(96, 1)))


def test_windows_follow_another_image_size() -> None:
    options: dict[str, Any] = dict(embed_dim=24, depths=(2, 2, 2, 2), num_classes=3)
    model = timm.create_model('swin_tiny_patch4_window7_224_ea', img_size=128, window_size=4, **options)
    assert len(cores(model)) == 8 and outputs(model, image(128))[0].shape == (2, 3)


def test_options_reach_the_attention() -> None:
    model = timm.create_model(
        'test_vit_ea',
        ea_memory=8,
        ea_norm='softmax',
        ea_num_heads=1,
        ea_target=r'blocks\.[0-2]\.attn',
        ea_exclude=r'blocks\.2\..*',
        ea_input_size=[3, 160, 160],
    )
    assert cores(model).keys() == {'blocks.0.attn.core', 'blocks.1.attn.core'}
    config = sem_timm.AttentionConfig('external', memory=8, norm='softmax', num_heads=1)
    assert {part.operation for part in sem_timm.patched_modules(model)} == {config}
    layer = timm.create_model('test_vit_eamlp', eamlp_num_heads=4, eamlp_memory=16, eamlp_target='blocks.0.attn')
    assert {part.operation for part in sem_timm.patched_modules(layer)} == {
        sem_timm.AttentionConfig('eamlp', num_heads=4, memory=16)
    }


def test_unknown_and_impossible_options_are_errors_before_a_model_is_built(calls: list[dict[str, Any]]) -> None:
    general = 'the prefix ea_. There are also ea_target, ea_exclude, ea_input_size.'
    with pytest.raises(OptionError, match="test_vit_ea: option 'memry' of attention 'external' is unknown") as caught:
        timm.create_model('test_vit_ea', ea_memry=8)
    assert 'Close: memory.' in str(caught.value) and general in str(caught.value)
    with pytest.raises(OptionError, match=r'There are: num_heads, memory, norm.|There are: memory, norm, num_heads.'):
        timm.create_model('test_vit_ea', ea_zzz=8)
    with pytest.raises(OptionError, match="test_vit_ea: option 'attention' of attention 'external' is unknown"):
        timm.create_model('test_vit_ea', ea_attention='linear')
    with pytest.raises(OptionError, match='test_vit_ea: memory=0'):
        timm.create_model('test_vit_ea', ea_memory=0)
    with pytest.raises(OptionError, match="test_vit_eamlp: option 'norm' of attention 'eamlp' is unknown"):
        timm.create_model('test_vit_eamlp', eamlp_norm='softmax')
    assert calls == []
    with pytest.raises(TypeError, match='sem_reduction'):  # an option of another variant is none of timm's either
        timm.create_model('test_vit_ea', sem_reduction=8)


def test_targets_that_match_nothing_or_are_refused_are_errors() -> None:
    with pytest.raises(sem_timm.NoMatchError, match="target 'layer1' matches no module"):
        timm.create_model('test_vit_ea', ea_target='layer1')
    with pytest.raises(sem_timm.RefusedError, match=r'blocks\.0\.mlp'):
        timm.create_model('test_vit_ea', ea_target='blocks.0.mlp')


def test_pretrained_cfg_names_the_variant(base_weights: Callable[..., str]) -> None:
    assert timm.create_model('test_vit_ea').pretrained_cfg['architecture'] == 'test_vit_ea'
    features = timm.create_model('test_vit_eamlp', features_only=True)
    assert features.pretrained_cfg['architecture'] == 'test_vit_eamlp'
    overlay = dict(file=base_weights('test_vit'))
    model, _ = create('test_vit_ea.r160_in1k', pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg['architecture'] == 'test_vit_ea' and model.pretrained_cfg['tag'] == 'r160_in1k'
    assert model.pretrained_cfg['file'] == overlay['file'] and model.default_cfg is model.pretrained_cfg


def test_everything_else_is_passed_through(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    create('test_vit_ea.r160_in1k', pretrained=True, cache_dir=tmp_path, pretrained_strict=False, qkv_bias=False)
    (call,) = calls
    assert call == dict(
        pretrained=True,
        pretrained_cfg='r160_in1k',
        pretrained_cfg_overlay={'architecture': 'test_vit_ea'},
        cache_dir=tmp_path,
        pretrained_strict=False,
        qkv_bias=False,
    )


@since_timm('1.0.31', 'resolve_model_input_args')
def test_weights_of_the_base_are_found_from_a_cfg_of_the_variant(calls: list[dict[str, Any]]) -> None:
    """timm's scripts hand on the cfg itself, and that of the variant names no weights."""
    from timm.models import resolve_model_input_args

    arguments = resolve_model_input_args('test_vit_ea.r160_in1k', {'input_size': (1, 96, 96)}, ea_memory=8)
    base, cfg = get_pretrained_cfg('test_vit.r160_in1k'), get_pretrained_cfg('test_vit_ea.r160_in1k')
    assert base is not None and base.hf_hub_id == 'timm/test_vit.r160_in1k'
    model, caught = create(arguments.pop('model_name'), **arguments, pretrained=True)
    create('test_vit_ea', pretrained=True, pretrained_cfg=cfg)
    assert len(calls) == 2 and len(caught) == 1
    for call in calls:
        overlay = call['pretrained_cfg_overlay']
        assert overlay['hf_hub_id'] == base.hf_hub_id and overlay['architecture'] == 'test_vit_ea'
    assert model.pretrained_cfg['hf_hub_id'] == base.hf_hub_id and model.pretrained_cfg['tag'] == 'r160_in1k'
    assert outputs(model, image(channels=1))[0].shape == (2, 1000)


def test_cfg_of_the_callers_own_is_left_alone() -> None:
    cfg = dict(url='https://example.org/weights.pth', input_size=(3, 160, 160), num_classes=4)
    model = timm.create_model('test_vit_ea', pretrained_cfg=cfg)
    assert model.pretrained_cfg['url'] == cfg['url'] and 'hf_hub_id' not in model.pretrained_cfg
    assert model.num_classes == 4


def test_weights_that_do_not_exist_are_an_error_as_in_timm() -> None:
    base = next(name for name in BASES if is_model(f'{name}_ea') and not timm.models.is_model_pretrained(name))
    for cfg in (None, get_pretrained_cfg(f'{base}_ea'), dict(input_size=(3, 224, 224))):
        with building_weightless(), pytest.raises(RuntimeError, match=f'No pretrained weights exist for {base}_ea'):
            timm.create_model(f'{base}_ea', pretrained=True, pretrained_cfg=cfg)
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(none_such\) for test_vit_ea'):
        timm.create_model('test_vit_ea.none_such', pretrained=True)
    with pytest.raises(FileNotFoundError):
        timm.create_model('test_vit_ea', pretrained=True, pretrained_cfg_overlay=dict(file='none_such.pth'))


def test_checkpoint_of_a_variant_loads_without_a_word(tmp_path: Path) -> None:
    for suffix in VARIANTS:
        model = timm.create_model(f'test_vit_{suffix}')
        train(model)
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth')
        loaded, caught = create(f'test_vit_{suffix}', checkpoint_path=tmp_path / 'checkpoint.pth')
        assert caught == []
        assert_equal(outputs(loaded, image(160)), outputs(model, image(160)))


def test_entrypoint_and_copies_work() -> None:
    model = model_entrypoint('test_vit_ea')(num_classes=3, ea_memory=None)
    assert_equal(outputs(copy.deepcopy(model), image(160)), outputs(model, image(160)))


@pytest.mark.parametrize(
    ('base', 'feature_cls', 'size'),
    first_of_each(
        [
            *[('test_vit', name, 160) for name in (None, 'hook', 'getter', 'fx')],
            *[('mobilevit_xxs', name, 64) for name in (None, 'list', 'dict', 'hook', 'fx')],
            ('pvt_v2_b0', None, 64),
            ('edgenext_xx_small', None, 64),
            ('levit_128s', None, 224),
        ],
        lambda base, feature_cls, size: base,
    ),
)
def test_features_have_the_form_of_those_of_the_base(base: str, feature_cls: str | None, size: int) -> None:
    name = f'{base}_ea' if base != 'edgenext_xx_small' else f'{base}_eamlp'
    kwargs: dict[str, Any] = dict(features_only=True, feature_cls=feature_cls)
    model, expected = timm.create_model(name, **kwargs), timm.create_model(base, **kwargs)
    assert type(model) is type(expected) and model.feature_info.info == expected.feature_info.info
    shapes = [feature.shape for feature in outputs(model, image(size))]
    assert shapes == [feature.shape for feature in outputs(expected, image(size))]
    assert cores(model)
    assert [key for key in model.state_dict() if '.core' not in key] == list(expected.state_dict())
