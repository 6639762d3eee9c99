"""Every attention class of timm that can be swapped: what a swap changes, and what it leaves as it was."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch

import sem_timm
from tests.families import Family
from tests.snapshot import Snapshot, assert_same, snapshot
from tests.swap.classes import CLASSES, by_form
from tests.swap.swapping import assert_all_learn, backward, outputs, shapes, swap
from tests.thorough import first_of_each
from tests.twins import assert_equal
from tests.versions import class_name

# Two classes may be found in one model, which need not be tested twice.
CLASSES_OF: dict[str, list[str]] = {}
for _name, _family in CLASSES.items():
    CLASSES_OF.setdefault(_family.architecture, []).append(_name)


@dataclass(frozen=True)
class Swapped:
    """A model of a class, made once for all tests of the class.

    Attributes:
        family: The family of the model.
        base: The model before the swap.
        model: The model after it.
        plan: What was swapped.
        before: What ``model`` was before it.
    """

    family: Family
    base: Any
    model: Any
    plan: sem_timm.Plan
    before: Snapshot


@pytest.fixture(scope='module', params=by_form(names[0] for names in CLASSES_OF.values()))
def each(request: pytest.FixtureRequest) -> Swapped:
    """Each class in turn. Some keep what a forward computed, so tests run copies; the last one undoes the swap."""
    torch.manual_seed(0)
    family = CLASSES[request.param]
    base = family.create()
    model = copy.deepcopy(base)
    before = snapshot(model)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    return Swapped(family, base, swap(model, plan), plan, before)


def class_names(model: Any, names: Any) -> set[str]:
    return {class_name(type(model.get_submodule(name))) for name in names}


def test_there_are_44_classes() -> None:
    assert len(CLASSES) == 44


def test_outputs_keep_their_shapes_at_other_batch_sizes_and_resolutions(each: Swapped) -> None:
    family, model = each.family, copy.deepcopy(each.model)
    assert class_names(each.base, [site.name for site in each.plan]) >= set(CLASSES_OF[family.architecture])
    for batch_size, size in ((3, family.size), (1, family.other_size or family.size)):
        images = family.images(batch_size, size)
        expected, found = outputs(each.base, images), outputs(model, images)
        assert [output.shape for output in found] == [output.shape for output in expected]
        assert all(output.isfinite().all() for output in found)
        assert not torch.equal(found[0], expected[0])


def test_every_parameter_that_requires_a_gradient_gets_one(each: Swapped) -> None:
    """In training mode; without dropped paths, which would leave some branches without a gradient other than zero."""
    model = copy.deepcopy(each.model).train()
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
    backward(model, each.family.images())
    assert_all_learn(model)


def test_copies_and_pickles_give_the_same_outputs(each: Swapped) -> None:
    model, images = copy.deepcopy(each.model), each.family.images()
    expected = outputs(model, images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sem_timm.patched_modules(other) == sem_timm.patched_modules(model)
        assert_equal(expected, outputs(other, images))


def test_base_keys_keep_their_values_and_undo_is_exact(each: Swapped) -> None:
    model, before, weights = each.model, each.before, each.base.state_dict()
    after = model.state_dict()
    assert list(weights) == [key for key in after if key in weights]
    assert all(torch.equal(tensor, after[key]) for key, tensor in weights.items())
    added = tuple(f'{m.name}.{child}.' for m in sem_timm.patched_modules(model) for child in m.inserted)
    new = after.keys() - weights.keys()
    assert new and all(key.startswith(added) and '.core' in key for key in new)
    sem_timm.unpatch_model(model)
    assert_same(before, snapshot(model), random_state=False)


# Images of 896 and 768 pixels and many blocks with two cores take long to check in numbers.
_SMALLER_INPUT = {'sam2_hiera_tiny': (3, 256, 256), 'gemma4_vit_167m': (3, 192, 192)}
_SMALLER: dict[str, dict[str, Any]] = {
    'gemma4_vit_167m': {'img_size': 192},
    'vit_dpwee_patch16_reg1_gap_256': {'depth': 4},
    'vit_dwee_patch16_reg1_gap_256': {'depth': 4},
}


@pytest.mark.parametrize(
    'name', first_of_each(names[0] for names in CLASSES_OF.values()), ids=lambda name: CLASSES[name].architecture
)
def test_as_published_without_weights(name: str) -> None:
    architecture = CLASSES[name].architecture
    with torch.device('meta'):
        model = timm.create_model(architecture, **_SMALLER.get(architecture, {})).eval()
    size = _SMALLER_INPUT.get(architecture, model.default_cfg['input_size'])
    images = torch.empty(2, *size, device='meta')
    expected = shapes(model, images)
    plan = sem_timm.plan_model(model, 'external', input_size=size)
    assert class_names(model, [site.name for site in plan]) >= set(CLASSES_OF[architecture])
    assert shapes(swap(model, plan), images) == expected


def calls(model: Any, family: Family) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each attention module is called with."""
    found: dict[str, Any] = {}
    sites = {site.name for site in sem_timm.plan_model(model, 'external', input_size=family.input_size)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: found.update({name: (args, kwargs)}), with_kwargs=True
        )
        for name in sites
    ]
    outputs(model, family.images())
    for hook in hooks:
        hook.remove()
    return found


# Classes whose position bias, or window, alone fixes the number of tokens, with the axes that the tokens are on.
FIXED: dict[str, tuple[int, ...]] = {
    'layers.bottleneck_attn.BottleneckAttn': (2, 3),
    'models.beit.Attention': (1,),
    'models.efficientformer.Attention': (1,),
    'models.gcvit.WindowAttentionGlobal': (1,),
    'models.levit.Attention': (1,),
    'models.maxxvit.Attention2d': (2, 3),
    'models.maxxvit.AttentionCl': (1, 2),
    'models.swin_transformer.WindowAttention': (1,),
    'models.swin_transformer_v2.WindowAttention': (1,),
    'models.swin_transformer_v2_cr.WindowMultiHeadAttention': (1,),
    'models.tiny_vit.Attention': (1,),
    'models.vision_transformer_relpos.RelPosAttention': (1,),
}


@pytest.mark.parametrize('name', first_of_each(FIXED, FIXED.get))
def test_modules_that_only_their_position_bias_tied_to_a_size_become_free(name: str) -> None:
    family = CLASSES[name]
    base = family.create()
    model = swap(copy.deepcopy(base), 'external', input_size=family.input_size)
    at_sites = {site: call for site, call in calls(base, family).items() if name in class_names(base, [site])}
    assert at_sites
    for site, ((x, *rest), kwargs) in at_sites.items():
        larger = x.repeat(*(2 if axis in FIXED[name] else 1 for axis in range(x.ndim)))
        with pytest.raises((AssertionError, RuntimeError)):
            outputs(base.get_submodule(site), larger, *rest)
        with torch.no_grad():
            usual = base.get_submodule(site)(x, *rest, **kwargs).shape
            found = model.get_submodule(site)(larger, *rest, **kwargs).shape
        assert found == tuple(2 * size if axis in FIXED[name] else size for axis, size in enumerate(usual))


# Models that nothing but their attention tied to a size, and one that they can then take.
FREE = {
    'layers.bottleneck_attn.BottleneckAttn': 96,
    'models.efficientformer.Attention': 256,
    'models.maxxvit.Attention2d': 96,
    'models.mvitv2.MultiScaleAttention': 96,
}


@pytest.mark.parametrize('name', first_of_each(FREE))
def test_models_that_only_their_attention_tied_to_a_size_become_free(name: str) -> None:
    family = CLASSES[name]
    base, images = family.create(), family.images(1, FREE[name])
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        outputs(base, images)
    expected = shapes(base, family.images(1))
    assert shapes(swap(base, 'external', input_size=family.input_size), images) == expected
