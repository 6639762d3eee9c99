"""Plans of swaps: pure, printable, data, and for the model they were made for."""

from __future__ import annotations

import json
import warnings

import pytest
import timm
import torch

import sem_timm
from sem_timm import AttentionConfig, PlanError, SwapWarning
from tests.families import Family
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.swap.classes import CLASSES, SHARED_TABLES, by_form
from tests.swap.swapping import swap
from tests.thorough import first_of_each
from tests.versions import attention_takes

VIT = CLASSES['layers.attention.Attention']
SWIN = CLASSES['models.swin_transformer.WindowAttention']
FAMILIES = {
    name: {**CLASSES, **SHARED_TABLES}[name]
    for name in (
        'beit shared',
        'layers.attention2d.MultiQueryAttention2d',
        'models.convit.MHSA',
        'models.cpubone.ConvAttention',
        'models.efficientvit_msra.CascadedGroupAttention',
        'models.gcvit.WindowAttentionGlobal',
        'models.gemma4_vit.Gemma4Attention',
        'models.levit.Attention',
        'models.mvitv2.MultiScaleAttention',
        'models.swin_transformer.WindowAttention',
        'models.tiny_vit.Attention',
        'models.vision_transformer_sam.Attention',
    )
}


@pytest.mark.parametrize('name', by_form(FAMILIES))
def test_planning_is_pure(name: str) -> None:
    family = FAMILIES[name]
    model = family.create()
    model.train()
    before = snapshot(model)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    assert_same(before, snapshot(model))
    again = sem_timm.plan_model(family.create().to('meta'), 'external', input_size=family.input_size)
    assert (again.sites, again.refusals, again.unread) == (plan.sites, plan.refusals, plan.unread)
    assert again.sliced == plan.sliced


@pytest.mark.parametrize('operation', ['eamlp', 'efficient', 'halo', 'catt'])
def test_planning_other_attentions_is_pure(operation: str) -> None:
    model = SWIN.create().train()
    before = snapshot(model)
    sem_timm.plan_model(model, operation, input_size=SWIN.input_size)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    'config', [AttentionConfig('external', memory=8), AttentionConfig('eamlp'), AttentionConfig('catt')]
)
@pytest.mark.parametrize('name', first_of_each(['models.swin_transformer_v2.WindowAttention', 'models.convit.MHSA']))
def test_a_plan_is_data(config: AttentionConfig, name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    plan = sem_timm.plan_model(model, config, input_size=family.input_size)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data['model'] == type(model).__name__ and data['input_size'] == [3, 64, 64]
    assert data['operation'] == config.to_dict() and data['identity'] is False
    assert [site['name'] for site in data['sites']] == [site.name for site in plan]
    assert [tuple(site['shape']) for site in data['sites']] == [site.shape for site in plan]
    assert data['num_parameters'] == plan.num_parameters == sum(site['num_parameters'] for site in data['sites'])
    assert data['unread'] == list(plan.unread) and set(data['sliced']) == set(plan.sliced)
    assert [refusal['reason'] for refusal in data['refusals']] == [refusal.reason for refusal in plan.refusals]


def test_a_plan_prints_a_line_for_each_site() -> None:
    model = SWIN.create()
    plan = sem_timm.plan_model(model, 'external', input_size=SWIN.input_size)
    header, rule, *lines = str(plan).splitlines()
    assert header.split() == ['site', 'class', 'queries', 'heads', 'tokens', 'new', 'parameters']
    assert set(rule) == {'-', ' '}
    name, cls, *numbers = lines[0].split()
    assert (name, cls) == ('layers.0.blocks.0.attn', 'WindowAttention')
    assert ' '.join(numbers) == 'B x 3 x 16 x 8 3 16 3,072'
    total, unread = lines[len(plan) :]
    assert '4 sites' in total and f'{plan.num_parameters:,} new parameters' in total and 'SwinTransformer' in total
    assert '3 x 64 x 64' in total and 'the outputs change' in total and 'needs training' in total
    assert 'No longer read: 4 parameters' in unread and 'stop requiring gradients' in unread


def test_a_plan_says_whether_the_outputs_stay_close() -> None:
    plan = sem_timm.plan_model(VIT.create(), 'monarch')
    assert str(plan).endswith('0 new parameters; the outputs stay close to the original, without training.')
    assert not plan.needs_training and plan.losing_terms == ()
    plan = sem_timm.plan_model(SWIN.create(), 'monarch', input_size=SWIN.input_size)
    assert plan.needs_training and plan.losing_terms == tuple(site.name for site in plan)
    assert 'the outputs change, and the model needs training' in str(plan)
    assert 'Position biases, or masks of windows, go with the old attention: layers.0.blocks.0.attn, ' in str(plan)
    assert sem_timm.plan_model(VIT.create(), 'external').needs_training
    assert not sem_timm.plan_model(VIT.create(), 'sem').needs_training


def test_a_plan_counts_what_patching_adds() -> None:
    for name in ('models.swin_transformer.WindowAttention', 'models.efficientvit_msra.CascadedGroupAttention'):
        family = CLASSES[name]
        model = family.create()
        plan = sem_timm.plan_model(model, 'external', memory=8, input_size=family.input_size)
        before = sum(p.numel() for p in model.parameters())
        swap(model, plan)
        assert sum(p.numel() for p in model.parameters()) - before == plan.num_parameters
        for site in plan:
            core = model.get_submodule(f'{site.name}.{site.attribute}')
            assert (core.num_heads, core.head_dim, core.value_dim) == (
                site.num_heads,
                site.shape[-1],
                site.value_shape[-1],
            )


def test_sites_say_what_was_found() -> None:
    def only(name: str, number: int = 0) -> sem_timm.AttentionSite:
        family = CLASSES[name]
        return sem_timm.plan_model(family.create(), 'external', input_size=family.input_size).sites[number]

    vit = only('layers.attention.Attention')
    assert (vit.shape, vit.num_heads, vit.head_axis, vit.num_prefix_tokens, vit.masked) == (
        (2, 2, 17, 32),
        2,
        -3,
        1,
        attention_takes('attn_mask'),
    )
    swin = only('models.swin_transformer.WindowAttention')
    assert (swin.shape, swin.num_heads, swin.masked) == ((32, 3, 16, 8), 3, False)
    hiera = only('models.hiera.MaskUnitAttention')
    assert (len(hiera.shape), hiera.head_axis, hiera.num_heads) == (5, -4, hiera.shape[1]) or hiera.num_heads == 1
    pvt = only('models.pvt_v2.Attention')
    assert (pvt.shape, pvt.key_shape, pvt.grid_size) == ((2, 1, 256, 32), (2, 1, 4, 32), (16, 16))
    folded = only('layers.bottleneck_attn.BottleneckAttn')
    assert folded.num_heads == 1 and folded.shape[0] % 2 == 0
    levit = only('models.levit.AttentionDownsample', 2)
    assert levit.shape[-2] * 4 == levit.key_shape[-2] and levit.value_shape[-1] == 4 * levit.shape[-1]


def test_the_source_of_a_forward() -> None:
    plan = sem_timm.plan_model(SWIN.create(), 'external', input_size=SWIN.input_size)
    code = plan.code('layers.0.blocks.0.attn')
    assert code.startswith('def forward(self, x') and 'self.core(' in code and 'relative_position' not in code
    with pytest.raises(sem_timm.OptionError, match='not a site'):
        plan.code('layers.0.blocks.0')


def test_a_plan_for_another_model() -> None:
    model, other = VIT.create(), VIT.create()
    plan = sem_timm.plan_model(other, 'external')
    with refused(model, PlanError, 'another VisionTransformer', 'plan_model(model, ...)'):
        sem_timm.patch_model(model, plan)


def test_a_plan_for_a_model_that_has_changed() -> None:
    model = VIT.create()
    plan = sem_timm.plan_model(model, 'external')
    swap(model, 'efficient', target='blocks.2.attn')
    with refused(model, PlanError, 'has changed', 'blocks.2.attn'):
        sem_timm.patch_model(model, plan)
    sem_timm.unpatch_model(model)
    swap(model, plan)
    with refused(model, PlanError, 'has changed', 'blocks.0.attn'):
        sem_timm.patch_model(model, plan)


def test_options_beside_a_plan() -> None:
    model = VIT.create()
    plan = sem_timm.plan_model(model, 'external')
    with refused(model, sem_timm.OptionError, 'memory given beside a plan'):
        sem_timm.patch_model(model, plan, memory=8)


def test_the_warning_says_what_to_do_and_points_at_the_caller() -> None:
    model = VIT.create()
    with pytest.warns(SwapWarning) as caught:
        sem_timm.patch_model(model, 'external')
    (warning,) = caught
    parts = ('VisionTransformer', 'external', 'not an identity', 'needs training', 'unpatch_model(model)')
    assert [part for part in parts if part not in str(warning.message)] == []
    assert warning.filename == __file__
    with pytest.warns(SwapWarning) as caught:
        sem_timm.patch_model(VIT.create(), sem_timm.plan_model(VIT.create(), 'external').operation)
    assert caught[0].filename == __file__


def test_the_warning_of_an_attention_that_is_close_says_what_was_measured() -> None:
    with pytest.warns(
        SwapWarning, match=r'VisionTransformer: monarch .* close to, without training\. .*\d %'
    ) as caught:
        sem_timm.patch_model(VIT.create(), 'monarch')
    assert 'needs training' not in str(caught[0].message) and 'unpatch_model(model)' in str(caught[0].message)
    with pytest.warns(SwapWarning, match=r'but for the position biases .* at 4 of 4 sites\. .* needs training'):
        sem_timm.patch_model(SWIN.create(), 'monarch', input_size=SWIN.input_size)


def test_planning_and_undoing_do_not_warn() -> None:
    model = VIT.create()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan = sem_timm.plan_model(model, 'external')
    swap(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sem_timm.unpatch_model(model)
        model(VIT.images())


def test_the_record_of_a_swap() -> None:
    family = Family('vit_dwee_patch16_reg1_gap_256', options=CLASSES['layers.diff_attention.DiffAttention'].options)
    model = family.create()
    swap(model, 'external', memory=8, input_size=family.input_size, target='blocks.1.attn')
    (record,) = sem_timm.patched_modules(model)
    assert (record.name, record.class_name, record.inserted) == ('blocks.1.attn', 'DiffAttention', ('core1', 'core2'))
    assert record.position == 'core' and record.operation == AttentionConfig('external', memory=8)
    assert torch.is_tensor(model.blocks[1].attn.core2.mk)


@pytest.mark.parametrize('architecture', first_of_each(['vit_relpos_small_patch16_224', 'test_maxvit', 'test_vit']))
def test_the_sites_do_not_depend_on_how_attention_is_spelled(architecture: str) -> None:
    with torch.device('meta'):
        fused = sem_timm.plan_model(timm.create_model(architecture), 'external')
        timm.layers.set_fused_attn(False)
        try:
            spelled_out = sem_timm.plan_model(timm.create_model(architecture), 'external')
        finally:
            timm.layers.set_fused_attn(True)
    assert [site.name for site in spelled_out] == [site.name for site in fused]
