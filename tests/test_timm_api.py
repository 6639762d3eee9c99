"""What timm offers for a model works for a patched one, with the same results."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import group_parameters

import sem_timm
from sem_timm.compat import param_groups_layer_decay, param_groups_weight_decay
from tests.compatibility.twins import assert_close
from tests.families import FAMILIES
from tests.lively import lively
from tests.thorough import first_of_each
from tests.twins import assert_equal, both, inserted, several, trained
from tests.versions import CHECKPOINTS_WITHOUT_GRADIENTS


@several
def test_features_only(name: str) -> None:
    model, patched, family = both(name, features_only=True, out_indices=(0, 2))
    assert sem_timm.patched_modules(patched)
    assert patched.feature_info.channels() == model.feature_info.channels()
    with torch.no_grad():
        before = model(family.images())
        assert_equal(before, patched(family.images()))
        changed = trained(patched)(family.images())
    assert [tensor.shape for tensor in changed] == [tensor.shape for tensor in before]
    assert not torch.equal(changed[-1], before[-1])


def test_features_only_with_hooks_and_with_a_graph() -> None:
    model, patched, family = both('convnext', features_only=True, feature_cls='hook')
    with torch.no_grad():
        assert_equal(model(family.images()), patched(family.images()))
    model = FAMILIES['resnet'].create(features_only=True, feature_cls='fx')
    with pytest.raises(sem_timm.ModelError, match='GraphModule'):
        sem_timm.patch_model(model.graph_module)


@several
def test_forward_intermediates(name: str) -> None:
    model, patched, family = both(name)
    for options in ({}, {'indices': 2, 'intermediates_only': True}, {'norm': True} if name == 'vit_registers' else {}):
        with torch.no_grad():
            assert_equal(
                model.forward_intermediates(family.images(), **options),
                patched.forward_intermediates(family.images(), **options),
            )
    with torch.no_grad():
        final, features = trained(patched).forward_intermediates(family.images())
        assert torch.equal(final, patched.forward_features(family.images()))
        assert not torch.equal(features[-1], model.forward_intermediates(family.images())[1][-1])


@several
def test_gradient_checkpointing(name: str) -> None:
    family = FAMILIES[name]
    results = []
    for checkpointing in (False, True):
        model = trained(sem_timm.patch_model(family.create(), input_size=family.input_size)).train()
        model.double().set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)  # for swin's stochastic depth
        logits = model(family.images().double())
        logits.square().mean().backward()
        results.append((logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    if CHECKPOINTS_WITHOUT_GRADIENTS:
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(results[0][0], results[1][0])
    # What is computed again is computed the plain way: a gate sums up its gradients in another order.
    assert_close(results[0][1], results[1][1], rtol=1e-9, scale=1e-12)
    assert inserted(model).keys() <= results[1][1].keys()


@several
def test_layer_decay(name: str) -> None:
    base, model, _ = both(name)
    scales = {id(p): group['lr_scale'] for group in param_groups_layer_decay(model, 0.05) for p in group['params']}
    assert len(scales) == sum(1 for _ in model.parameters())
    for module in sem_timm.patched_modules(model):
        block = model.get_submodule(module.name)
        new = {id(p) for child in module.inserted for p in block.get_submodule(child).parameters()}
        own = {scales[id(p)] for p in block.parameters() if id(p) not in new}
        assert new and len(own) == 1 and {scales[p] for p in new} == own, module.name
    expected = {id(p): group['lr_scale'] for group in param_groups_layer_decay(base, 0.05) for p in group['params']}
    named = dict(model.named_parameters())
    assert [expected[id(p)] for _, p in base.named_parameters()] == [
        scales[id(named[n])] for n, _ in base.named_parameters()
    ]


@several
def test_group_matcher_and_no_weight_decay(name: str) -> None:
    base, model, _ = both(name)
    if hasattr(base, 'no_weight_decay'):
        assert model.no_weight_decay() == base.no_weight_decay()
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        assert str(matcher) == str(base.group_matcher(coarse=coarse))
        before = group_parameters(base, base.group_matcher(coarse=coarse), reverse=True)
        after = group_parameters(model, matcher, reverse=True)
        assert {key: group for key, group in after.items() if key in before} == before
    decayed = {
        id(p) for group in param_groups_weight_decay(model, 0.1) if group['weight_decay'] for p in group['params']
    }
    for key, parameter in inserted(model).items():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), key


@several
def test_model_ema(name: str) -> None:
    _, model, family = both(name)
    average = timm.utils.ModelEmaV3(model, decay=0.75)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained(model)
    average.update(model)
    assert list(average.module.state_dict()) == list(before)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * model.state_dict()[key], msg=key)
    average.set(model)
    with torch.no_grad():
        assert_equal(model(family.images()), average.module(family.images()))


@several
def test_reset_classifier(name: str) -> None:
    base, model, family = both(name)
    for classes in (7, 0):
        for each in (base, model):
            torch.manual_seed(0)
            each.reset_classifier(classes)
        assert base.num_classes == model.num_classes == classes
        with torch.no_grad():
            assert_equal(base(family.images()), model(family.images()))
    base.reset_classifier(0, 'max' if name != 'vit_registers' else 'avg')
    model.reset_classifier(0, 'max' if name != 'vit_registers' else 'avg')
    with torch.no_grad():
        assert_equal(base(family.images()), model(family.images()))


@pytest.mark.filterwarnings('ignore::UserWarning')  # timm's resampling of position biases makes torch warn
@pytest.mark.parametrize('name', first_of_each(['vit_registers', 'swin']))
def test_set_input_size(name: str) -> None:
    fixed = {'dynamic_img_size': False} if name == 'vit_registers' else {}
    base, model, _ = both(name, **fixed)
    for each in (base, model):
        each.set_input_size(img_size=(96, 128))
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_equal(base(images), model(images))
    later = sem_timm.patch_model(base)
    later.load_state_dict(trained(model).state_dict())
    assert [site.name for site in sem_timm.patched_modules(later)] == [
        site.name for site in sem_timm.patched_modules(model)
    ]
    with torch.no_grad():
        assert_equal(later(images), model(images))
    assert sem_timm.plan_model(sem_timm.unpatch_model(model)).input_size == (3, 96, 128)


@pytest.mark.parametrize(
    'architecture',
    first_of_each(
        ['repghostnet_050', 'mobileone_s0', 'fastvit_t8', 'lcnetv2_base', 'shvit_s1', 'efficientvim_m1'], count=2
    ),
)
def test_reparameterization_is_right_or_refused(architecture: str) -> None:
    """timm folds branches into one convolution; where that removes a patched sum, the gate must not go unnoticed."""
    torch.manual_seed(0)
    model = lively(timm.create_model(architecture, num_classes=10)).eval()
    size = 128 if architecture == 'efficientvim_m1' else 64
    trained(sem_timm.patch_model(model, input_size=(3, size, size)))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
        try:
            folded = timm.utils.reparameterize_model(model)
        except sem_timm.SemTimmError as error:
            assert 'unpatch_model' in str(error)
            return
        # Folding rounds differently.
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_other_conversions_of_timm() -> None:
    base, model, family = both('resnet')
    with torch.no_grad():
        gated = trained(copy.deepcopy(model))
        expected = gated(family.images())
        for convert in (timm.layers.freeze_batch_norm_2d, timm.layers.unfreeze_batch_norm_2d):
            base, model, gated = convert(base), convert(model), convert(gated).eval()
            assert_equal(base(family.images()), model(family.images()))
            # Frozen norms round differently, and norms that are frozen no more are new ones in training mode.
            torch.testing.assert_close(gated(family.images()), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected, base(family.images()))
    timm.utils.freeze(model, 'layer1')
    assert not any(p.requires_grad for n, p in inserted(model).items() if n.startswith('layer1.'))
    assert all(p.requires_grad for n, p in inserted(model).items() if not n.startswith('layer1.'))
    base, model, family = both('vit_registers')
    for each in (base, model):
        each.prune_intermediate_layers([1], prune_norm=True, prune_head=True)
    with torch.no_grad():
        assert_equal(base(family.images()), model(family.images()))
    assert [record.name for record in sem_timm.patched_modules(model)] == ['blocks.0', 'blocks.1']
