"""What timm and torch offer for a model works for a patched one, with the same results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

import sem_timm
from tests.families import FAMILIES, Family

several = pytest.mark.parametrize('name', ['resnet', 'efficientnet', 'convnext', 'vit_registers', 'swin'])


def both(name: str, **options: Any) -> tuple[Any, Any, Family]:
    """A base model, its patched twin with the same weights, and their family."""
    family = FAMILIES[name]
    model = family.create(**options)
    return model, sem_timm.patch_model(copy.deepcopy(model), input_size=family.input_size), family


def trained(model: nn.Module) -> nn.Module:
    """Gives every inserted module weights that change the output."""
    generator = torch.Generator().manual_seed(5)
    for parameter in inserted(model).values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def inserted(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the patch added, by name."""
    prefixes = tuple(f'{m.name}.{child}.' for m in sem_timm.patched(model) for child in m.inserted)
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit, in nested lists, tuples and dictionaries too."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second), (first - second).abs().max()
        return
    if isinstance(first, dict):
        assert list(first) == list(second)
        first, second = list(first.values()), list(second.values())
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert_equal(one, other)


@several
def test_features_only(name: str) -> None:
    model, patched, family = both(name, features_only=True, out_indices=(0, 2))
    assert sem_timm.patched(patched)
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
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)  # for swin's stochastic depth
        logits = model(family.images())
        logits.square().mean().backward()
        results.append((logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    assert_equal(*results)
    assert inserted(model).keys() <= results[1][1].keys()


@several
def test_layer_decay(name: str) -> None:
    base, model, _ = both(name)
    scales = {id(p): group['lr_scale'] for group in param_groups_layer_decay(model, 0.05) for p in group['params']}
    assert len(scales) == sum(1 for _ in model.parameters())
    for module in sem_timm.patched(model):
        block = model.get_submodule(module.name)
        new = {id(p) for child in module.inserted for p in block.get_submodule(child).parameters()}
        own = {scales[id(p)] for p in block.parameters() if id(p) not in new}
        assert new and len(own) == 1 and {scales[p] for p in new} == own, module.name
    expected = {id(p): group['lr_scale'] for group in param_groups_layer_decay(base, 0.05) for p in group['params']}
    named = dict(model.named_parameters())
    assert [expected[id(p)] for _, p in base.named_parameters()] == [scales[id(named[n])] for n, _ in base.named_parameters()]


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
    decayed = {id(p) for group in param_groups_weight_decay(model, 0.1) if group['weight_decay'] for p in group['params']}
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
def test_copy_and_pickle(name: str) -> None:
    base, model, family = both(name)
    trained(model)
    with torch.no_grad():
        expected = model(family.images())
        for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert sem_timm.patched(other) == sem_timm.patched(model)
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert_equal(expected, other(family.images()))
        twin = copy.deepcopy(model)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
        sem_timm.unpatch_model(twin)
        assert_equal(base(family.images()), twin(family.images()))
        assert_equal(expected, model(family.images()))


@several
def test_compile_without_graph_breaks(name: str) -> None:
    _, model, family = both(name)
    compiled = torch.compile(trained(model), fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert_equal(model(family.images()), compiled(family.images()))


@pytest.mark.parametrize(('name', 'block'), [('resnet', 'layer1.0'), ('vit_registers', 'blocks.0')])
def test_compile_with_inductor(name: str, block: str) -> None:
    _, model, family = both(name)
    module = trained(model).get_submodule(block)
    x = torch.randn(2, *{'resnet': (32, 8, 8), 'vit_registers': (21, 64)}[name])
    with torch.no_grad():
        # Fusing operations rounds differently.
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-3, atol=1e-4)


@several
def test_export(name: str) -> None:
    _, model, family = both(name)
    with torch.no_grad():
        exported = torch.export.export(
            trained(model), (family.images(),), dynamic_shapes=({0: torch.export.Dim('batch')},), strict=False
        ).module()
        for batch_size in (2, 5):
            assert_equal(model(family.images(batch_size)), exported(family.images(batch_size)))


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
@pytest.mark.parametrize('name', ['vit_registers', 'swin'])
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
    assert [site.name for site in sem_timm.patched(later)] == [site.name for site in sem_timm.patched(model)]
    with torch.no_grad():
        assert_equal(later(images), model(images))
    assert sem_timm.plan_model(sem_timm.unpatch_model(model)).input_size == (3, 96, 128)


@several
def test_autocast_and_half_precision(name: str) -> None:
    base, model, family = both(name)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert_equal(base(family.images()), model(family.images()))
    with torch.autocast('cpu', torch.bfloat16):
        trained(model).train()(family.images()).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in inserted(model).values())
    base, model, _ = both(name)
    with torch.no_grad():
        images = family.images().bfloat16()
        assert_equal(base.bfloat16()(images), model.bfloat16()(images))
    later = sem_timm.patch_model(base, input_size=family.input_size)
    assert {p.dtype for p in inserted(later).values()} == {torch.bfloat16}


@pytest.mark.parametrize('name', ['resnet', 'efficientnet', 'convnext', 'regnet'])
def test_channels_last(name: str) -> None:
    base, model, family = both(name)
    for each in (base, model):
        each.to(memory_format=torch.channels_last)
    kept = []
    for module in sem_timm.patched(model):
        gate = model.get_submodule(f'{module.name}.{module.inserted[0]}')
        gate.register_forward_hook(lambda gate, args, out: kept.append((args, out)))
    images = family.images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_equal(base(images), model(images))
    assert len(kept) == len(sem_timm.patched(model))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for args, out in kept for t in (*args, out))


@several
def test_functional_call(name: str) -> None:
    base, model, family = both(name)
    weights = copy.deepcopy(trained(copy.deepcopy(model)).state_dict())
    with torch.no_grad():
        expected = torch.func.functional_call(model, weights, (family.images(),))
        assert not torch.equal(expected, model(family.images()))
        assert_equal(base(family.images()), model(family.images()))
        model.load_state_dict(weights)
        assert_equal(expected, model(family.images()))


def test_train_and_eval_reach_the_new_modules() -> None:
    _, model, _ = both('resnet')
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
    model.layer1.train()
    sem_timm.unpatch_model(model)
    sem_timm.patch_model(model)
    assert model.layer1[0].sem.training and not model.layer2[0].sem.training


@pytest.mark.parametrize(
    'architecture', ['repghostnet_050', 'mobileone_s0', 'fastvit_t8', 'lcnetv2_base', 'shvit_s1', 'efficientvim_m1']
)
def test_reparameterization_is_right_or_refused(architecture: str) -> None:
    """timm folds branches into one convolution; where that removes a patched sum, the gate must not go unnoticed."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10).eval()
    size = 128 if architecture == 'efficientvim_m1' else 64
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
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
        for convert in (timm.layers.freeze_batch_norm_2d, timm.layers.unfreeze_batch_norm_2d):
            base, model = convert(base), convert(model)
            assert_equal(base(family.images()), model(family.images()))
    timm.utils.freeze(model, 'layer1')
    assert not any(p.requires_grad for n, p in inserted(model).items() if n.startswith('layer1.'))
    assert all(p.requires_grad for n, p in inserted(model).items() if not n.startswith('layer1.'))
    base, model, family = both('vit_registers')
    for each in (base, model):
        each.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
    with torch.no_grad():
        assert_equal(base(family.images()), model(family.images()))
    assert [record.name for record in sem_timm.patched(model)] == ['blocks.0', 'blocks.1']


@pytest.mark.filterwarnings('ignore::UserWarning')  # of ConvNeXt's gradient strides, without a patch too
@several
def test_distributed_training_needs_every_parameter(name: str, tmp_path: Any) -> None:
    """A wrapper without `find_unused_parameters` stops at the second step if a parameter got no gradient."""
    _, model, family = both(name, **({'drop_path_rate': 0.0} if name == 'swin' else {}))
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(wrapper.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            wrapper(family.images()).square().mean().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    sem_timm.unpatch_model(wrapper.module)
    assert not sem_timm.patched(wrapper)
