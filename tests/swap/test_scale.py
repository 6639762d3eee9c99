"""The size of what a swapped attention adds to its block, right after the swap: about that of the old one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import Family
from tests.swap.classes import CLASSES
from tests.swap.swapping import outputs, swap, tensors

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


NORMAL = (
    'layers.attention.Attention',
    'layers.attention.AttentionRope',
    'layers.attention2d.MultiQueryAttention2d',
    'models.beit.Attention',
    'models.fastvit.Attention',
    'models.levit.Attention',
    'models.maxxvit.AttentionCl',
    'models.pvt_v2.Attention',
    'models.swin_transformer.WindowAttention',
    'models.tnt.Attention',
    'models.visformer.Attention',
)


def ratios_on_normal_inputs(base: nn.Module, family: Family, operation: str) -> dict[str, float]:
    plan = sem_timm.plan_model(base, operation, input_size=family.input_size)
    calls = calls_of_attention(base, plan, family.images(4))
    generator = torch.Generator().manual_seed(7)
    normal = {n: ((torch.randn(x.shape, generator=generator), *rest), k) for n, ((x, *rest), k) in calls.items()}
    model = swap(copy.deepcopy(base), operation, input_size=family.input_size)
    return variances(base, model, normal)


@pytest.mark.parametrize('name', NORMAL)
def test_external_attention_keeps_the_variance_on_normally_distributed_inputs(name: str) -> None:
    family = CLASSES[name]
    # In a width of 24 a few channels decide.
    base = family.create(**({'embed_dim': 96} if 'swin' in name else {}))
    assert_within_a_factor_of_two(ratios_on_normal_inputs(base, family, 'external'))


WHOLE = ('layers.attention.Attention', 'models.beit.Attention', 'models.pvt_v2.Attention')
WHOLE += ('models.swin_transformer.WindowAttention', 'models.tnt.Attention', 'models.hiera.MaskUnitAttention')


@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.parametrize('weights', [as_initialised, Family.create], ids=['initial', 'biased'])
def test_eamlp_keeps_the_variance_on_normally_distributed_inputs(name: str, weights: Any) -> None:
    family = CLASSES[name]
    assert_within_a_factor_of_two(ratios_on_normal_inputs(weights(family), family, 'eamlp'))


@pytest.mark.parametrize(
    'architecture',
    [
        'deit3_small_patch16_224',
        'mvitv2_tiny',
        'pvt_v2_b0',
        'swin_tiny_patch4_window7_224',
        'test_maxvit',
        'twins_svt_small',
        'vit_small_patch16_224',
        'volo_d1_224',
    ],
)
def test_external_attention_keeps_the_variance_on_what_blocks_get_from_random_images(architecture: str) -> None:
    """Tokens inside a network are not independent: what they share survives the average that attention takes."""
    base = as_initialised(Family(architecture))
    images = torch.randn(2, *base.default_cfg['input_size'], generator=torch.Generator().manual_seed(1))
    plan = sem_timm.plan_model(base, 'external')
    model = swap(copy.deepcopy(base), 'external')
    assert_within_a_factor_of_two(variances(base, model, calls_of_attention(base, plan, images)))


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
