"""EAMLP in place of whole attention modules, talking heads and gated positional attention among them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm import MultiHeadExternalAttention, OptionError, RefusedError
from tests.families import Family
from tests.refusals import refused
from tests.snapshot import assert_same, snapshot
from tests.swap import small_attention
from tests.swap.classes import CLASSES
from tests.swap.swapping import assert_all_learn, backward, outputs, shapes, swap, swapped
from tests.thorough import first_of_each
from tests.twins import assert_equal
from tests.versions import CONVIT_CHANGES_ITSELF, Attention

CAIT = Family('cait_xxs24_224', options={'img_size': 64, 'depth': 2}, other_size=None)
VIT = CLASSES['layers.attention.Attention']

# For each: the modules it takes, by class.
TAKEN: dict[str, tuple[Family, set[str]]] = {
    'vit': (VIT, {'Attention'}),
    'cait': (CAIT, {'TalkingHeadAttn'}),
    'convit': (CLASSES['models.convit.MHSA'], {'MHSA'} if CONVIT_CHANGES_ITSELF else {'GPSA', 'MHSA'}),
    'eva': (CLASSES['models.eva.EvaAttention'], {'EvaAttention'}),
    'beit': (CLASSES['models.beit.Attention'], {'Attention'}),
    'pvt_v2': (CLASSES['models.pvt_v2.Attention'], {'Attention'}),
    'swin': (CLASSES['models.swin_transformer.WindowAttention'], {'WindowAttention'}),
    'tiny_vit': (CLASSES['models.tiny_vit.Attention'], {'Attention'}),
    'tnt': (CLASSES['models.tnt.Attention'], {'Attention'}),
}


@pytest.mark.parametrize('name', first_of_each(TAKEN, count=4))
def test_shapes_gradients_copies_and_undo(name: str) -> None:
    family, classes = TAKEN[name]
    base, model = family.create(), family.create()
    if name == 'convit' and CONVIT_CHANGES_ITSELF:
        outputs(model, family.images())  # what it changes is for images of this size, once
    before = snapshot(model)
    plan = sem_timm.plan_model(model, 'eamlp', input_size=family.input_size)
    assert {site.class_name for site in plan} == classes
    swap(model, plan)
    assert all(type(model.get_submodule(site.name).core) is MultiHeadExternalAttention for site in plan)
    backward(model, family.images())
    assert_all_learn(model)
    for size in ((1, family.size), (3, family.other_size or family.size)):
        assert shapes(model, family.images(*size)) == shapes(base, family.images(*size))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(outputs(model, family.images()), outputs(other, family.images()))
    model.zero_grad()
    sem_timm.unpatch_model(model)
    before['rng'] = torch.get_rng_state()
    assert_same(before, snapshot(model))


def test_the_width_and_heads_are_those_of_the_module() -> None:
    model = swapped(VIT, 'eamlp')
    for block in model.blocks:
        assert isinstance(block.attn, Attention)
        new = block.attn.core
        assert (new.num_heads, new.head_dim) == (4 * block.attn.num_heads, 64 // block.attn.num_heads)
    model = swapped(VIT, 'eamlp', num_heads=4, memory=8, qkv_bias=False)
    new = model.blocks[0].attn.core
    assert (new.num_heads, new.mk.out_features, new.q.bias) == (16, 8, None)


def test_a_plan_counts_its_parameters() -> None:
    model = VIT.create()
    plan = sem_timm.plan_model(model, 'eamlp', memory=8)
    before = sum(p.numel() for p in model.parameters())
    swap(model, plan)
    assert sum(p.numel() for p in model.parameters()) - before == plan.num_parameters
    assert [site.shape for site in plan] == [(2, 17, 64)] * 6


# Contracts that a layer from (B, N, C) to (B, N, C) cannot keep.
REFUSED: dict[str, tuple[Family, str, str]] = {
    'NHWC': (CLASSES['models.maxxvit.AttentionCl'], 'stages.0.blocks.0.attn_block.attn', 'input is not (B, N, C)'),
    'NCHW': (CLASSES['models.visformer.Attention'], 'stage2.0.attn', 'input is not (B, N, C)'),
    'windows': (CLASSES['models.nest.Attention'], 'levels.0.transformer_encoder.0.attn', 'input is not (B, N, C)'),
    'fewer tokens': (
        CLASSES['models.levit.AttentionDownsample'],
        'stages.1.downsample.attn_downsample',
        'its output has not the shape (B, N, C) of its input',
    ),
    'one token': (CAIT, 'blocks_token_only.0.attn', 'its output has not the shape (B, N, C) of its input'),
    'block': (
        CLASSES['models.vision_transformer.ParallelScalingBlock'],
        'blocks.0',
        'it is a block, of which the attention is only a part',
    ),
    'queries from elsewhere': (
        CLASSES['models.gcvit.WindowAttentionGlobal'],
        'stages.0.blocks.1.attn',
        'it is also given q_global, which depends on the data',
    ),
    'no attention': (VIT, 'blocks.0.mlp', 'its own forward has no attention core'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_contracts_that_it_cannot_keep_are_refused(name: str) -> None:
    family, module, reason = REFUSED[name]
    model = family.create()
    with refused(model, RefusedError, f"target '{module}'", f'{module}: ', reason):
        sem_timm.patch_model(model, 'eamlp', target=module, input_size=family.input_size)


def test_an_argument_that_depends_on_the_data_is_refused() -> None:
    model = small_attention.Model(small_attention.PairsFromTheInput())
    with refused(model, RefusedError, 'it is also given attn_mask, which depends on the data'):
        sem_timm.patch_model(model, 'eamlp', target='attention.inner', input_size=(3, 32, 32))


def test_heads_that_do_not_divide_the_width() -> None:
    model = VIT.create()
    with refused(model, RefusedError, 'num_heads=5 does not divide dim=64', '1, 2, 4, 8, 16, 32, 64'):
        sem_timm.patch_model(model, 'eamlp', num_heads=5)
    with refused(model, RefusedError, "target 'blocks.0.attn'", 'num_heads=5 does not divide dim=64'):
        sem_timm.patch_model(model, 'eamlp', num_heads=5, target='blocks.0.attn')


@pytest.mark.parametrize('options', [{'num_heads': 0}, {'memory': 0}, {'num_heads': 2.5}, {'memory': '8'}])
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    model = VIT.create()
    (name, value) = next(iter(options.items()))
    with refused(model, OptionError, f'{name}={value!r}', '1 or more'):
        sem_timm.patch_model(model, 'eamlp', **options)


def test_dropout_is_an_option() -> None:
    model = swapped(VIT, 'eamlp', attn_drop=0.5, proj_drop=0.5)
    images = VIT.images()
    assert_equal(outputs(model, images), outputs(model, images))
    model.train()
    assert not outputs(model, images)[0].equal(outputs(model, images)[0])


def test_rates_of_dropout_are_those_of_the_module() -> None:
    model = swapped(VIT, 'eamlp', create={'attn_drop_rate': 0.3, 'proj_drop_rate': 0.2})
    new = model.blocks[0].attn.core
    assert (new.attn_drop.p, new.proj_drop.p) == (0.3, 0.2)
    model = swapped(VIT, 'eamlp', create={'attn_drop_rate': 0.3, 'proj_drop_rate': 0.2}, attn_drop=0.0)
    new = model.blocks[0].attn.core
    assert (new.attn_drop.p, new.proj_drop.p) == (0.0, 0.2)
    model = swapped(VIT, 'eamlp')
    assert (model.blocks[0].attn.core.attn_drop.p, model.blocks[0].attn.core.proj_drop.p) == (0.0, 0.0)


class Masked(nn.Module):
    """Calls timm's attention with a table of its own, or as causal."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.inner = Attention(16, num_heads=2)
        self.kwargs = kwargs
        self.register_buffer('table', torch.zeros(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **(self.kwargs or {'attn_mask': self.table}))


def test_a_table_for_pairs_of_tokens_is_refused() -> None:
    model = small_attention.Model(Masked())
    with refused(model, RefusedError, 'attention.inner: ', 'mask of shape (16, 16)', 'key-padding'):
        sem_timm.patch_model(model, 'eamlp', input_size=(3, 32, 32))


def test_a_causal_module_is_refused() -> None:
    model = small_attention.Model(Masked(is_causal=True))
    with refused(model, RefusedError, 'attention.inner: its attention is causal'):
        sem_timm.patch_model(model, 'eamlp', input_size=(3, 32, 32))


class MayMask(small_attention.Projected):
    """Takes a mask, and is given none."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def test_a_mask_that_is_not_given_is_none() -> None:
    plan = sem_timm.plan_model(small_attention.Model(MayMask()), 'eamlp', input_size=(3, 32, 32))
    assert [site.name for site in plan] == ['attention']
