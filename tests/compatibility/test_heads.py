"""Heads, and models that are cut down to a part."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, assert_same_gradients, gradients, unpatched
from tests.outputs import outputs
from tests.twins import assert_equal


@capability('`forward_features`, `forward_head`')
def test_forward_features_and_head(twins: Twins) -> None:
    images = twins.images()
    twins.same(lambda model: outputs(model.forward_features, images))
    twins.same(lambda model: outputs(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), images))
    for model in (twins.model, twins.moved()):
        head = outputs(lambda x, model=model: model.forward_head(model.forward_features(x)), images)
        assert_equal(head, outputs(model, images))


@capability('`reset_classifier`')
def test_reset_classifier(twins: Twins) -> None:
    images = twins.images()
    pooling = () if twins.name == 'deit_distilled' else ('avg',)  # its two heads read their own tokens
    for arguments in ((7,), (0,), (5, *pooling)):

        def use(model: Any, arguments: tuple[Any, ...] = arguments) -> list[torch.Tensor]:
            torch.manual_seed(1)
            model.reset_classifier(*arguments)
            assert model.num_classes == arguments[0]
            return outputs(model, images)

        twins.same(use)
    expected = gradients(twins.base, images)
    assert_same_gradients(twins, expected, gradients(twins.model, images))
    model = twins.moved()
    features = outputs(model.forward_features, images)
    assert not torch.equal(features[0], outputs(twins.model.forward_features, images)[0])
    model.reset_classifier(7)
    assert_equal(outputs(model.forward_features, images), features)


@capability('`get_classifier`')
def test_get_classifier(twins: Twins) -> None:
    heads = twins.model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    own = dict(twins.model.named_modules())
    names = [name for head in heads for name, module in own.items() if module is head]
    expected = twins.base.get_classifier()
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert [type(head) for head in heads] == [type(head) for head in expected]
    assert len(names) == len(heads) and not any(name.startswith(part) for name in names for part in patched(twins))
    for head, other in zip(heads, expected):
        assert_equal(head.state_dict(), other.state_dict())
    model = twins.moved()
    seen: list[Any] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    logits = outputs(model, twins.images())
    assert len(seen) == len(heads) and torch.allclose(torch.stack(seen).mean(0), logits[0])


def patched(twins: Twins) -> list[str]:
    """Names that the inserted modules begin with."""
    return [f'{part.name}.{child}' for part in sem_timm.patched_modules(twins.model) for child in part.inserted]


@capability('`prune_intermediate_layers`')
def test_prune_intermediate_layers(twins: Twins) -> None:
    def cut(model: Any) -> nn.Module:
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers(indices=[0], prune_head=True)
        return kept

    images = twins.images()
    twins.same(lambda model: outputs(cut(model).forward_features, images))
    with unpatched():
        names = {name for name, _ in cut(twins.base).named_modules()}
    model = twins.moved()
    expected = outputs(lambda x: model.forward_intermediates(x, indices=[0], intermediates_only=True), images)
    found = outputs(lambda x: cut(model).forward_intermediates(x, indices=[0], intermediates_only=True), images)
    assert_equal(found, expected)
    kept = [part.name for part in sem_timm.patched_modules(cut(model))]
    assert kept == [part.name for part in sem_timm.patched_modules(model) if part.name in names]
    if kept:
        assert not sem_timm.patched_modules(sem_timm.unpatch_model(cut(model)))
