"""The size of what a swapped attention adds to its block, right after the swap: about that of the old one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import Family
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES, by_form
from tests.swap.swapping import outputs, swap, tensors
from tests.thorough import first_of_each

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_initialised(family: Family) -> nn.Module:
    """The model with timm's own initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(family.architecture, **{'num_classes': 10, **family.options}).eval()


def calls_of_attention(model: nn.Module, plan: sem_timm.Plan, images: Tensor) -> dict[str, Call]:
    """What each module of a plan is called with."""
    calls: dict[str, Call] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.update({name: (args, kwargs)}), with_kwargs=True
        )
        for name in {site.name for site in plan}
    ]
    outputs(model, images)
    for hook in hooks:
        hook.remove()
    return calls


def variances(base: nn.Module, model: nn.Module, calls: dict[str, Call]) -> dict[str, float]:
    """Ratios of the variances of the outputs, new to old, on the same inputs."""
    ratios = {}
    with torch.no_grad():
        for name, (args, kwargs) in calls.items():
            old, new = (tensors(each.get_submodule(name)(*args, **kwargs))[0] for each in (base, model))
            ratios[name] = float(new.var() / old.var())
    return ratios


def assert_within_a_factor_of_two(ratios: dict[str, float]) -> None:
    assert ratios and {name: ratio for name, ratio in ratios.items() if not 0.5 <= ratio <= 2} == {}


def ratios_on_images(base: nn.Module, family: Family, operation: str) -> dict[str, float]:
    """Ratios of the variances on what the modules get inside the model, from images that patching did not see."""
    model = copy.deepcopy(base)
    plan = sem_timm.plan_model(model, operation, input_size=family.input_size)
    return variances(base, swap(model, plan), calls_of_attention(base, plan, family.images(4)))


@pytest.mark.parametrize('name', by_form(CLASSES))
def test_external_attention_keeps_the_variance_of_every_class(name: str) -> None:
    family = CLASSES[name]
    assert_within_a_factor_of_two(ratios_on_images(family.create(), family, 'external'))


WHOLE = ('layers.attention.Attention', 'models.beit.Attention', 'models.pvt_v2.Attention')
WHOLE += ('models.swin_transformer.WindowAttention', 'models.tnt.Attention', 'models.hiera.MaskUnitAttention')


@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.parametrize(
    'weights', first_of_each([pytest.param(Family.create, id='biased'), pytest.param(as_initialised, id='initial')])
)
def test_eamlp_keeps_the_variance(name: str, weights: Any) -> None:
    family = CLASSES[name]
    assert_within_a_factor_of_two(ratios_on_images(weights(family), family, 'eamlp'))


@pytest.mark.parametrize(
    'architecture',
    first_of_each(
        [
            'deit3_small_patch16_224',
            'mvitv2_tiny',
            'pvt_v2_b0',
            'swin_tiny_patch4_window7_224',
            'test_maxvit',
            'twins_svt_small',
            'vit_small_patch16_224',
            'volo_d1_224',
        ]
    ),
)
def test_external_attention_keeps_the_variance_with_initial_weights(architecture: str) -> None:
    base = as_initialised(Family(architecture))
    images = torch.randn(2, *base.default_cfg['input_size'], generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(base)
    plan = sem_timm.plan_model(model, 'external')
    assert_within_a_factor_of_two(variances(base, swap(model, plan), calls_of_attention(base, plan, images)))


def test_the_start_depends_on_the_seed_alone() -> None:
    family = CLASSES['layers.attention.Attention']
    starts = []
    for seed in (0, 0, 1):
        model = family.create()
        torch.manual_seed(seed)
        starts.append(swap(model).state_dict()['blocks.3.attn.core.mk'])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_matching_draws_no_random_number_and_moves_no_statistics() -> None:
    family = CLASSES['layers.attention2d.MultiQueryAttention2d']
    model = family.create().train()
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    swap(model, plan)
    state = torch.get_rng_state()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.manual_seed(0)
    for site in plan:
        plan.operation.build(site, torch.device('cpu'), torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_a_module_that_returns_zero_leaves_its_new_core_alone() -> None:
    base = as_initialised(CLASSES['models.levit.Attention'])  # its last norm starts at zero
    model = swap(base, 'eamlp', input_size=CLASSES['models.levit.Attention'].input_size)
    assert all(
        torch.isfinite(p).all() and p.any() for n, p in model.named_parameters() if n.endswith('core.proj.weight')
    )


class OnMetaOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise RuntimeError('no kernel here')
        return x


def test_a_model_that_cannot_run_where_it_is_is_swapped_with_a_warning() -> None:
    model: Any = CLASSES['layers.attention.Attention'].create()
    model.norm_pre = OnMetaOnly()
    with pytest.warns(sem_timm.SwapWarning) as warned:
        sem_timm.patch_model(model, 'external')
    assert any('no kernel here' in str(warning.message) for warning in warned)
    assert len(sem_timm.patched_modules(model)) == len(model.blocks)


def test_new_cores_are_trained_or_not_as_their_modules_are() -> None:
    model = CLASSES['layers.attention.Attention'].create().train()
    model.get_submodule('blocks.1.attn').eval()
    swap(model)
    modes = [model.get_submodule(f'blocks.{block}.attn.core').training for block in (0, 1)]
    assert modes == [True, False]


def test_under_another_default_device() -> None:
    model = CLASSES['layers.attention.Attention'].create()
    with torch.device('meta'):
        swap(model)
    assert not any(p.is_meta for p in model.parameters())


def test_a_warning_made_an_error_changes_nothing() -> None:
    model = CLASSES['layers.attention.Attention'].create()
    before = snapshot(model)
    with warnings.catch_warnings(), pytest.raises(sem_timm.SwapWarning):
        warnings.simplefilter('error')
        sem_timm.patch_model(model, 'external')
    assert_same(before, snapshot(model))
