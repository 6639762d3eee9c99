"""The attention classes of timm whose cores can be swapped, each in a small model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.families import SMALL_MVITV2, SMALL_SWIN, Family
from tests.thorough import thorough
from tests.versions import EFFICIENTVIT

_VIT: dict[str, Any] = {'img_size': 64, 'embed_dim': 64, 'depth': 2, 'num_heads': 2}
_FOUR: dict[str, Any] = {'embed_dims': (32, 64, 96, 128), 'depths': (1, 1, 1, 1)}

# By the class's module and name.
CLASSES = {
    'layers.attention.Attention': Family('test_vit', options={'img_size': 64, 'dynamic_img_size': True}),
    'layers.attention.AttentionRope': Family(
        'vit_pe_core_tiny_patch16_384', options={**_VIT, 'dynamic_img_size': True}
    ),
    'layers.attention2d.MultiQueryAttention2d': Family('mobilenetv4_hybrid_medium_075'),
    'layers.bottleneck_attn.BottleneckAttn': Family('eca_botnext26ts_256', options={'img_size': 64}, other_size=None),
    'layers.diff_attention.DiffAttention': Family('vit_dwee_patch16_reg1_gap_256', options=_VIT, other_size=None),
    'layers.halo_attn.HaloAttn': Family('eca_halonext26ts', size=256, other_size=512),
    'models.beit.Attention': Family('beit_base_patch16_224', options=_VIT, other_size=None),
    'models.convit.MHSA': Family('convit_tiny', options={**_VIT, 'local_up_to_layer': 1}, other_size=None),
    'models.cpubone.ConvAttention': Family('cpubone_nano'),
    'models.davit.WindowAttention': Family('davit_tiny', options={**_FOUR, 'num_heads': (1, 2, 3, 4)}),
    'models.efficientformer.Attention': Family(
        'efficientformer_l1',
        size=224,
        options={'embed_dims': (16, 16, 32, 64), 'depths': (1, 1, 1, 2)},
        other_size=None,
    ),
    'models.efficientformer_v2.Attention2dDownsample': Family(
        'efficientformerv2_s0', options={'img_size': 64}, other_size=None
    ),
    'models.efficientvit_msra.CascadedGroupAttention': Family('efficientvit_m0', **EFFICIENTVIT),
    'models.eva.EvaAttention': Family('vit_tiny_patch16_dinov3_qkvb', options={**_VIT, 'dynamic_img_size': True}),
    'models.fastvit.Attention': Family(
        'fastvit_mci0', options={'embed_dims': (32, 64, 128, 256), 'layers': (1, 1, 1, 1)}
    ),
    'models.gcvit.WindowAttentionGlobal': Family(
        'gcvit_xxtiny', options={'img_size': 64, 'window_size': (2, 2, 2, 2)}, other_size=None
    ),
    'models.gemma4_vit.Gemma4Attention': Family(
        'gemma4_vit_167m', options={**_VIT, 'head_dim': 32, 'intermediate_size': 64}
    ),
    'models.hiera.MaskUnitAttention': Family(
        'hiera_tiny_224', options={'img_size': (64, 64), 'embed_dim': 32, 'stages': (1, 1, 1, 1)}, other_size=None
    ),
    'models.hieradet_sam2.MultiScaleAttention': Family(
        'sam2_hiera_tiny', options={'embed_dim': 32, 'stages': (1, 2, 2, 1), 'global_att_blocks': (4,)}
    ),
    'models.iformer.SHMA': Family('iformer_t'),
    'models.levit.Attention': Family('levit_128s', size=128, options={'img_size': 128}, other_size=None),
    'models.levit.AttentionDownsample': Family('levit_128s', size=128, options={'img_size': 128}, other_size=None),
    'models.lowformer.ConvAttention': Family('lowformer_b0'),
    'models.maxxvit.Attention2d': Family('test_coatnet', options={'img_size': 64}, other_size=None),
    'models.maxxvit.AttentionCl': Family('test_maxvit', options={'img_size': 64}, other_size=128),
    'models.metaformer.Attention': Family('caformer_s18'),
    'models.mvitv2.MultiScaleAttention': Family('mvitv2_tiny', options=SMALL_MVITV2, other_size=None),
    'models.nest.Attention': Family('nest_tiny', options={'img_size': 64}, other_size=None),
    'models.nextvit.EfficientAttention': Family('nextvit_small', options={'depths': (1, 2, 5, 2)}),
    'models.pvt_v2.Attention': Family('pvt_v2_b0', options=_FOUR | {'num_heads': (1, 2, 3, 4)}),
    'models.shvit.SHSA': Family('shvit_s1', size=128),
    'models.swin_transformer.WindowAttention': Family('swin_tiny_patch4_window7_224', options=SMALL_SWIN),
    'models.swin_transformer_v2.WindowAttention': Family('swinv2_tiny_window8_256', options=SMALL_SWIN),
    'models.swin_transformer_v2_cr.WindowMultiHeadAttention': Family('swinv2_cr_tiny_224', options=SMALL_SWIN),
    'models.tiny_vit.Attention': Family('tiny_vit_5m_224', options={**_FOUR, 'num_heads': (1, 2, 3, 4)}),
    'models.tnt.Attention': Family(
        'tnt_s_legacy_patch16_224',
        options={'img_size': 64, 'embed_dim': 64, 'depth': 2, 'num_heads_outer': 2, 'inner_dim': 24},
        other_size=None,
    ),
    'models.twins.GlobalSubSampleAttn': Family(
        'twins_svt_small', options={'img_size': 64, **_FOUR, 'depths': (2, 1, 1, 1)}
    ),
    'models.twins.LocallyGroupedAttn': Family(
        'twins_svt_small', options={'img_size': 64, **_FOUR, 'depths': (2, 1, 1, 1)}
    ),
    'models.visformer.Attention': Family(
        'visformer_tiny', options={'img_size': 64, 'embed_dim': 96, 'depth': (1, 1, 1)}, other_size=None
    ),
    'models.vision_transformer.DiffParallelScalingBlock': Family(
        'vit_dpwee_patch16_reg1_gap_256', options=_VIT, other_size=None
    ),
    'models.vision_transformer.ParallelScalingBlock': Family(
        'vit_pwee_patch16_reg1_gap_256', options=_VIT, other_size=None
    ),
    'models.vision_transformer_relpos.RelPosAttention': Family(
        'test_vit_relpos', options={'img_size': 64}, other_size=None
    ),
    'models.vision_transformer_sam.Attention': Family(
        'samvit_base_patch16_224', options={**_VIT, 'window_size': 2, 'global_attn_indexes': (1,)}
    ),
    'models.volo.Attention': Family('volo_d1_224', options={'img_size': 64}, other_size=None),
}

# How tokens, heads, keys and windows lie: attentions that differ in what a swap has to know of them.
FORMS = {
    'class token': 'layers.attention.Attention',
    'rotary': 'models.eva.EvaAttention',
    'windows': 'models.swin_transformer.WindowAttention',
    'channels first': 'models.maxxvit.Attention2d',
    'fewer keys': 'models.pvt_v2.Attention',
    'one key for all heads': 'layers.attention2d.MultiQueryAttention2d',
    'transposed': 'models.shvit.SHSA',
    'folded heads': 'layers.bottleneck_attn.BottleneckAttn',
    'windows behind heads': 'models.hiera.MaskUnitAttention',
    'several cores': 'models.efficientvit_msra.CascadedGroupAttention',
}


def by_form(names: Iterable[str]) -> list[Any]:
    """Names of classes for `pytest.mark.parametrize`: one class of each form, and the others marked ``thorough``."""
    return [name if name in FORMS.values() else pytest.param(name, marks=thorough) for name in names]


_SHARED: dict[str, Any] = {**_VIT, 'shared_rel_pos': True}

# Models in which something outside the attention makes the position bias, for one block or for all.
SHARED_TABLES = {
    'beit shared': Family(
        'beit_base_patch16_224', options={**_VIT, 'use_rel_pos_bias': False, 'use_shared_rel_pos_bias': True}
    ),
    'relpos shared mlp': Family('vit_relpos_base_patch32_plus_rpn_256', options=_SHARED),
    'relpos shared bias': Family('vit_relpos_base_patch32_plus_rpn_256', options={**_SHARED, 'rel_pos_type': 'bias'}),
    'coatnet mlp': Family('coatnet_rmlp_nano_rw_224', options={'img_size': 64}),
    'swinv2 cr': CLASSES['models.swin_transformer_v2_cr.WindowMultiHeadAttention'],
}
