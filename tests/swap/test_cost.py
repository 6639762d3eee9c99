"""What a swapped forward computes: nothing that does not reach the output."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import sem_timm
from tests.families import Family
from tests.swap.classes import CLASSES, SHARED_TABLES, by_form
from tests.swap.swapping import outputs, swap, swapped
from tests.twins import assert_equal

# Classes that are found in the model of another.
SAME_MODEL = ('models.levit.AttentionDownsample', 'models.twins.LocallyGroupedAttn')


class Reads(TorchDispatchMode):
    """Counts, by memory, how often operations read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage().data_ptr()
                self.counts[memory] = self.counts.get(memory, 0) + 1
        return function(*args, **kwargs or {})

    def of(self, tensor: Tensor) -> int:
        return self.counts.get(tensor.untyped_storage().data_ptr(), 0)


def reads(module: nn.Module, *args: Any, **kwargs: Any) -> Reads:
    with torch.no_grad(), Reads() as counted:
        module(*args, **kwargs)
    return counted


def names_read(model: nn.Module, family: Family) -> set[str]:
    """Names of the parameters and buffers that some operation reads."""
    counted = reads(model, family.images())
    return {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if counted.of(tensor)}


@pytest.mark.parametrize('name', by_form(n for n in CLASSES if n not in SAME_MODEL))
def test_no_operation_reads_what_the_plan_calls_unread(name: str) -> None:
    family = CLASSES[name]
    model = family.create()
    before = names_read(model, family)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    assert set(plan.unread) <= before
    swap(model, plan)
    after = names_read(model, family)
    assert {key.rpartition('.')[0] for key in after - before} == {f'{site.name}.{site.attribute}' for site in plan}
    assert not after & set(plan.unread)


def test_masks_of_shifted_windows_are_not_looked_at() -> None:
    family = CLASSES['models.swin_transformer.WindowAttention']
    model = family.create(strict_img_size=True)  # otherwise masks are computed for each input
    assert any('attn_mask' in key for key in names_read(model, family))
    swap(model, 'external')
    assert not any('attn_mask' in key for key in names_read(model, family))


# Buffers and tables of positions that only the old attention looked at.
TABLES = {
    'layers.bottleneck_attn.BottleneckAttn': ('pos_embed.',),
    'layers.halo_attn.HaloAttn': ('pos_embed.',),
    'models.beit.Attention': ('relative_position_index', 'relative_position_bias_table'),
    'models.efficientformer.Attention': ('attention_bias_idxs', 'attention_biases'),
    'models.efficientvit_msra.CascadedGroupAttention': ('attention_bias_idxs', 'attention_biases'),
    'models.levit.Attention': ('attention_bias_idxs', 'attention_biases'),
    'models.maxxvit.Attention2d': ('relative_position_index', 'relative_position_bias_table'),
    'models.maxxvit.AttentionCl': ('relative_position_index', 'relative_position_bias_table'),
    'models.mvitv2.MultiScaleAttention': ('rel_pos_h', 'rel_pos_w', 'pool_k', 'pool_v', 'norm_k', 'norm_v'),
    'models.pvt_v2.Attention': ('kv.', 'sr.', 'attn.norm.'),
    'models.swin_transformer.WindowAttention': ('relative_position_index', 'relative_position_bias_table'),
    'models.swin_transformer_v2.WindowAttention': ('relative_coords_table', 'cpb_mlp', 'logit_scale'),
    'models.swin_transformer_v2_cr.WindowMultiHeadAttention': ('relative_coordinates_log', 'meta_mlp'),
    'models.tiny_vit.Attention': ('attention_bias_idxs', 'attention_biases'),
    'models.vision_transformer_relpos.RelPosAttention': ('relative_position_index', 'rel_coords_log', 'rel_pos.mlp'),
    'models.vision_transformer_sam.Attention': ('rel_pos_h', 'rel_pos_w'),
    'coatnet mlp': ('rel_coords_log', 'relative_position_index', 'rel_pos.mlp'),
}


@pytest.mark.parametrize('name', by_form(TABLES))
def test_keys_values_and_positions_are_not_computed(name: str) -> None:
    family = {**CLASSES, **SHARED_TABLES}[name]
    for table in TABLES[name]:
        assert any(table in key for key in names_read(family.create().train(), family)), table
    model = swapped(family)
    for training in (False, True):
        found = names_read(model.train(training), family)
        assert [key for key in found if any(table in key for table in TABLES[name])] == []


@pytest.mark.parametrize('name', SHARED_TABLES)
def test_a_table_for_all_blocks_that_no_block_reads_is_frozen_and_told(name: str) -> None:
    family = SHARED_TABLES[name]
    model, images = family.create(), family.images()
    before = outputs(model, images)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    swap(model, plan)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        still = names_read(each, family) & set(plan.unread)
        assert bool(still) == bool(plan.computed)
        assert not any(each.get_parameter(name).requires_grad for name in plan.unread)
        assert all(key.startswith(tuple(f'{module}.' for module in plan.computed)) for key in still)
    assert ('Still computed, in whole or in part for nobody' in repr(plan)) == bool(plan.computed)
    assert_equal(outputs(sem_timm.unpatch_model(model), images), before)


def test_a_table_for_all_blocks_is_computed_where_one_block_still_reads_it() -> None:
    family = SHARED_TABLES['relpos shared bias']
    model = family.create()
    swap(model, 'external', exclude='blocks.0.attn', input_size=family.input_size)
    assert any(name.startswith('shared_rel_pos.') for name in names_read(model, family))


def test_modules_that_only_fed_the_old_core_are_not_called() -> None:
    for name, unused in (
        ('models.mvitv2.MultiScaleAttention', ('pool_k', 'pool_v', 'norm_k', 'norm_v')),
        ('models.gemma4_vit.Gemma4Attention', ('k_proj', 'v_proj', 'k_norm', 'v_norm')),
        ('models.pvt_v2.Attention', ('kv', 'sr')),
        ('layers.attention.Attention', ('k_norm', 'attn_drop')),
        ('models.vision_transformer_relpos.RelPosAttention', ('rel_pos', 'k_norm')),
    ):
        family = CLASSES[name]
        model = swapped(family)
        called = set(calls_of(model, dict(model.named_modules()), family.images()))
        for site in {module.name for module in sem_timm.patched_modules(model)}:
            inside = {child for child, _ in model.get_submodule(site).named_children()}
            assert inside & set(unused)
            assert {child for child in inside if f'{site}.{child}' in called} <= inside - set(unused)
            assert {site, f'{site}.core', f'{site}.{"o_proj" if "gemma4" in name else "proj"}'} <= called


@pytest.mark.parametrize('name', ['models.eva.EvaAttention', 'layers.attention.AttentionRope'])
def test_rotary_tables_are_applied_to_queries_alone(name: str) -> None:
    family = CLASSES[name]
    base, model = family.create(), swapped(family)
    tokens = torch.randn(2, 16 + (5 if 'eva' in name else 1), 64)
    rope = torch.randn(16, 64)
    site = 'blocks.0.attn'
    counts = [reads(each.get_submodule(site), tokens, rope=rope).of(rope) for each in (base, model)]
    assert counts[0] == 2 * counts[1] > 0


def test_rotary_tables_of_gemma_are_applied_to_queries_alone() -> None:
    family = CLASSES['models.gemma4_vit.Gemma4Attention']
    base, model = family.create(), swapped(family)
    tokens, cos, sin = torch.randn(2, 16, 64), torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    for table in (cos, sin):
        counts = [reads(each.encoder.blocks[0].attn, tokens, cos, sin).of(table) for each in (base, model)]
        assert counts[0] == 2 * counts[1] > 0


def calls_of(model: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> dict[str, Any]:
    """What each module is called with."""
    calls: dict[str, Any] = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.update({name: (args, kwargs)}), with_kwargs=True
        )
    outputs(model, images)
    return calls


def flops(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops())


PACKED = (
    'layers.attention.Attention',
    'layers.attention.AttentionRope',
    'models.beit.Attention',
    'models.davit.WindowAttention',
    'models.eva.EvaAttention',
    'models.fastvit.Attention',
    'models.gcvit.WindowAttentionGlobal',
    'models.maxxvit.Attention2d',
    'models.maxxvit.AttentionCl',
    'models.metaformer.Attention',
    'models.nest.Attention',
    'models.swin_transformer.WindowAttention',
    'models.swin_transformer_v2.WindowAttention',
    'models.swin_transformer_v2_cr.WindowMultiHeadAttention',
    'models.tiny_vit.Attention',
    'models.vision_transformer_relpos.RelPosAttention',
    'models.vision_transformer_sam.Attention',
    'models.visformer.Attention',
    'models.volo.Attention',
)


@pytest.mark.parametrize('name', by_form(PACKED))
def test_a_packed_projection_costs_a_third_and_the_core_is_linear(name: str) -> None:
    """FLOPs of a module: queries, two products with the memories, and the last projection; nothing else."""
    family, memory = CLASSES[name], 16
    model = family.create()
    plan = sem_timm.plan_model(model, 'external', memory=memory, input_size=family.input_size)
    modules = {site.name: model.get_submodule(site.name) for site in plan}
    swap(model, plan)
    calls = calls_of(model, modules, family.images())
    for site in plan:
        weights = dict(modules[site.name].named_parameters())
        qkv, proj = weights['qkv.weight'], weights['proj.weight']
        tokens = math.prod(site.shape) // (qkv.shape[0] // 3)
        core = 2 * math.prod(site.shape) * memory
        expected = 2 * (tokens * qkv.numel() // 3 + core + tokens * proj.numel())
        assert flops(modules[site.name], *calls[site.name]) <= expected, site.name


def test_rows_are_taken_head_by_head_where_heads_are_interleaved() -> None:
    for name, site in (
        ('models.maxxvit.Attention2d', 'stages.2.blocks.0.attn'),
        ('models.maxxvit.AttentionCl', 'stages.1.blocks.0.attn_block.attn'),
    ):
        family = CLASSES[name]
        plan = sem_timm.plan_model(family.create(), 'external', input_size=family.input_size)
        rows = plan.sliced[f'{site}.qkv.weight']
        assert (rows.first, rows.last, rows.period, rows.total) == (0, 32, 96, 192)
        assert 'last=32, period=96' in plan.code(site)
