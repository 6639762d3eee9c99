"""Features of inner layers."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from timm.models import create_feature_extractor

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_same_gradients, gradients, move, unpatched
from tests.outputs import outputs, tensors
from tests.twins import assert_equal

# torchvision's tracer finds that LeViT keeps its biases in evaluation mode
graphs = pytest.mark.filterwarnings('ignore:NOTE. The nodes obtained:UserWarning')


@capability('`features_only=True`')
def test_features_only(twins: Twins) -> None:
    check_features(twins)


@capability("`features_only=True, feature_cls='list'`", slow=True)
def test_features_only_list(twins: Twins) -> None:
    check_features(twins, feature_cls='list')


@capability("`features_only=True, feature_cls='dict'`", slow=True)
def test_features_only_dict(twins: Twins) -> None:
    check_features(twins, feature_cls='dict')


@capability("`features_only=True, feature_cls='hook'`")
def test_features_only_hook(twins: Twins) -> None:
    check_features(twins, feature_cls='hook')


@capability("`features_only=True, feature_cls='getter'`", slow=True)
def test_features_only_getter(twins: Twins) -> None:
    check_features(twins, feature_cls='getter')


@graphs
@capability("`features_only=True, feature_cls='fx'`")
def test_features_only_fx(twins: Twins) -> None:
    check_features(twins, feature_cls='fx')


def check_features(twins: Twins, **options: Any) -> None:
    """A variant made with features only has timm's features; what its gates change is what they change in the model."""
    options = {'features_only': True, 'out_indices': (0, -1), **options}
    with unpatched():
        base = twins.column.create(**options).eval()
        expected, expected_gradients = outputs(base, twins.images()), gradients(base, twins.images())
    variant: Any = twins.variant(**options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        loaded = variant.load_state_dict(base.state_dict(), strict=False)
    # Graph modules of torch 2.9 save all buffers, those too that only the replaced attention reads.
    saved = twins.base.state_dict()
    unsaved = {f'graph_module.{name}' for name, _ in twins.base.named_buffers() if name not in saved}
    assert set(loaded.unexpected_keys) <= unsaved
    assert all('.sem.' in key or '.core.' in key for key in loaded.missing_keys)
    assert type(variant).__name__ == type(base).__name__
    assert variant.feature_info.info == base.feature_info.info
    found = outputs(variant, twins.images())
    assert [each.shape for each in found] == [each.shape for each in expected]
    if twins.is_identity:
        assert_equal(found, expected)
    assert_same_gradients(twins, expected_gradients, gradients(variant, twins.images()), model=variant)
    move(variant)
    assert not torch.equal(outputs(variant, twins.images())[-1], found[-1])


@capability('`features_only=True`, patched afterwards')
def test_features_only_patched_afterwards(twins: Twins) -> None:
    options: dict[str, Any] = {'features_only': True, 'out_indices': (0, -1)}
    base = twins.column.create(**options)
    model = twins.patch(copy.deepcopy(base))
    assert model.feature_info.info == base.feature_info.info
    if twins.is_identity:
        assert_equal(outputs(model, twins.images()), outputs(base, twins.images()))
    before = gradients(base, twins.images()), outputs(model, twins.images())
    assert_same_gradients(twins, before[0], gradients(model, twins.images()), model=model)
    assert not torch.equal(outputs(move(model), twins.images())[-1], before[1][-1])
    sem_timm.unpatch_model(model)
    assert_equal(outputs(model, twins.images()), outputs(base, twins.images()))


@capability('`forward_intermediates`')
def test_forward_intermediates(twins: Twins) -> None:
    images = twins.images()
    for options in ({}, {'indices': 2}, {'indices': (0, -1), 'norm': True}, {'intermediates_only': True}):
        twins.same(lambda model, options=options: outputs(partial(model.forward_intermediates, **options), images))
    final, *_ = tensors(twins.model.forward_intermediates(images))
    assert final.shape == twins.base.forward_features(images).shape
    model = twins.moved()
    with torch.no_grad():
        final, features = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
    assert not torch.equal(features[-1], outputs(twins.model.forward_intermediates, images)[-1])


@graphs
@capability("timm's `create_feature_extractor` (torch.fx) on a patched model")
def test_create_feature_extractor(twins: Twins) -> None:
    def nodes(model: Any) -> list[str]:
        return [info['module'] for info in model.feature_info][-2:]

    with unpatched():
        base = create_feature_extractor(twins.base, nodes(twins.base))
        expected = outputs(base, twins.images())
        expected_gradients = gradients(base, twins.images())
    extractor = create_feature_extractor(twins.model, nodes(twins.base))
    if twins.is_identity:
        assert_equal(outputs(extractor, twins.images()), expected)
    assert_same_gradients(twins, expected_gradients, gradients(extractor, twins.images()), model=extractor)
    model = twins.moved()
    hooked: list[Any] = []
    for name in nodes(model):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: hooked.append(output))
    expected = tensors((outputs(model, twins.images()), hooked)[1])
    assert_equal(outputs(create_feature_extractor(model, nodes(twins.base)), twins.images()), expected)
