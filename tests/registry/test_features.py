"""Feature backbones of variants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureDictNet
from timm.models._features_fx import create_feature_extractor
from torch import nn

from sem_timm import (
    AttentionCore,
    CaaMAttention,
    ExternalAttention,
    ExternalAttention2d,
    HaloAttention,
    MultiHeadExternalAttention,
    patch_model,
)
from tests.lively import lively
from tests.registry.models import assert_equal, gates, image, outputs, train
from tests.thorough import first_of_each
from tests.twins import trained
from tests.versions import weightless


@pytest.mark.parametrize(
    ('base', 'feature_cls'),
    first_of_each(
        [
            *[('test_resnet', name) for name in (None, 'list', 'dict', 'hook', 'getter', 'fx')],
            *[('test_efficientnet', name) for name in (None, 'hook', 'getter', 'fx')],
            *[('test_convnext', name) for name in (None, 'list', 'hook', 'getter')],
            *[('test_vit', name) for name in (None, 'hook', 'getter')],
            ('mobilenetv3_small_050', None),
            ('test_nfnet', None),
        ],
        lambda base, feature_cls: base,
    ),
)
def test_features_are_those_of_the_base(base: str, feature_cls: str | None) -> None:
    kwargs: dict[str, Any] = dict(features_only=True, feature_cls=feature_cls, out_indices=(0, 2))
    torch.manual_seed(0)
    expected = timm.create_model(base, **kwargs)
    torch.manual_seed(0)
    model = timm.create_model(f'{base}_sem', **kwargs, sem_init='identity')
    assert type(model) is type(expected)
    assert model.feature_info.info == expected.feature_info.info
    assert model.feature_info.out_indices == expected.feature_info.out_indices
    size = model.pretrained_cfg['input_size'][-1]
    assert_equal(outputs(model, image(size)), outputs(expected, image(size)))
    train(expected)
    model.load_state_dict(expected.state_dict(), strict=False)
    assert_equal(outputs(model, image(size)), outputs(expected, image(size)))
    inserted = [key for key in model.state_dict() if '.sem.' in key]
    assert [key for key in model.state_dict() if key not in inserted] == list(expected.state_dict())
    called = set()
    for name, gate in gates(model).items():
        gate.register_forward_hook(lambda *_, name=name: called.add(name))
    outputs(model, image(size))
    assert called and called == gates(model).keys()


def test_features_take_a_wrapper_of_the_callers_own() -> None:
    for wrapper in (FeatureDictNet, lambda model, **cfg: FeatureDictNet(model, **cfg)):
        model = timm.create_model('test_resnet_sem', features_only=True, feature_cls=wrapper, out_indices=(1, 2))
        assert type(model) is FeatureDictNet and gates(model) and len(outputs(model, image())) == 2


def test_features_on_a_device_and_in_a_dtype() -> None:
    for base in ('test_efficientnet', 'test_vit'):
        model = weightless(f'{base}_sem', features_only=True, dtype=torch.bfloat16)
        assert gates(model)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize(
    'base', ['test_resnet', 'test_efficientnet', 'test_vit', 'test_convnext', 'mobilenetv3_small_050', 'test_byobnet']
)
def test_features_are_patched_where_the_whole_model_is(base: str) -> None:
    whole = gates(timm.create_model(f'{base}_sem'))
    for out_indices in ((0,), (0, 1, 2)):
        features = timm.create_model(f'{base}_sem', features_only=True, out_indices=out_indices)
        blocks = {_whole_name(name) for name, _ in features.named_modules()}
        patched = {_whole_name(name) for name in gates(features)}
        assert patched == {name for name in whole if name.removesuffix('.sem') in blocks}


def _whole_name(name: str) -> str:
    """The name that a module of a feature backbone has in the whole model."""
    return name.removeprefix('model.').replace('stages_', 'stages.')


def test_features_take_options_and_weights(base_weights: Callable[..., str]) -> None:
    kwargs: dict[str, Any] = dict(
        features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=base_weights('test_resnet'))
    )
    expected = timm.create_model('test_resnet', **kwargs)
    model = timm.create_model('test_resnet_sem', **kwargs, sem_target='layer[34].*')
    assert {name.split('.')[0] for name in gates(model)} == {'layer3', 'layer4'}
    assert_equal(outputs(model, image()), outputs(expected, image()))


def test_models_with_the_layer_of_eamlp_are_traced_for_features() -> None:
    options: dict[str, Any] = dict(img_size=64, attn_layer=MultiHeadExternalAttention)
    model = timm.create_model('test_vit', **options).eval()
    wrapped = timm.create_model('test_vit', **options, features_only=True, feature_cls='fx', out_indices=(1, 2)).eval()
    assert sum(isinstance(module, MultiHeadExternalAttention) for module in wrapped.modules()) == 3
    assert [tuple(feature.shape) for feature in wrapped(image())] == [(2, 17, 64)] * 2
    with torch.no_grad():
        features = create_feature_extractor(model, {'blocks.1': 'block', 'head': 'logits'})(image())
        expected = [*model.forward_intermediates(image(), [1], output_fmt='NLC', norm=False)[1], model(image())]
    assert_equal([features['block'][:, 1:], features['logits']], expected)


class OwnCore(ExternalAttention):
    """A core that was not there when leaves were named."""


@pytest.mark.parametrize('core', [ExternalAttention, HaloAttention, CaaMAttention, OwnCore])
def test_models_around_attention_cores_are_traced_for_features(core: type[AttentionCore]) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core(4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.core(*(x,) * (3 if core.reads_keys else 1)))

    model, x = Around().eval(), torch.randn(2, 3, 16, 4)
    with torch.no_grad():
        assert_equal([create_feature_extractor(model, {'norm': 'norm'})(x)['norm']], [model(x)])


def test_models_with_blocks_of_external_attention_are_traced_for_features() -> None:
    plain = lively(timm.create_model('test_resnet')).eval()
    model = trained(patch_model(copy.deepcopy(plain), 'external2d'))
    assert any(isinstance(module, ExternalAttention2d) for module in model.modules())
    with torch.no_grad():
        features = create_feature_extractor(model, {'layer2': 'stage', 'fc': 'logits'})(image())
        assert features['stage'].dim() == 4
        assert_equal([features['logits']], [model(image())])
        assert not torch.equal(features['logits'], plain(image()))
