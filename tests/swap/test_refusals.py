"""Attention that cannot be swapped: refused with the reason, by the plan and on request, and nothing has changed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import RefusedError
from tests.families import Family
from tests.refusals import refused
from tests.swap import small_attention
from tests.swap.classes import CLASSES
from tests.swap.small_attention import WIDTH, Model, Projected
from tests.swap.swapping import assert_all_learn, backward, outputs, swap
from tests.thorough import first_of_each
from tests.versions import CONVIT_CHANGES_ITSELF, Attention, needs_argument

_VIT: dict[str, Any] = {'img_size': 64, 'embed_dim': 64, 'depth': 2, 'num_heads': 2}
_CAIT = Family('cait_xxs24_224', options={'img_size': 64, 'depth': 1})
_XCIT = Family('xcit_nano_12_p16_224', options={'img_size': 64, 'depth': 2})

ONE_QUERY = 'it has a single query token, for which a softmax over tokens is constant'
POOLING = 'it pools its tokens into one; only one query is used'
CHANNELS = 'it attends over channels, not over tokens'
BATCH = 'it attends over the batch, not over tokens'
NO_PRODUCT = 'its softmax is not over products of queries and keys'

# For each class: a model, one of the modules, and the reason.
REFUSED: dict[str, tuple[Family, str, str]] = {
    'cait.ClassAttn': (_CAIT, 'blocks_token_only.0.attn', ONE_QUERY),
    'cait.ClassAttn in xcit': (_XCIT, 'cls_attn_blocks.1.attn', ONE_QUERY),
    'crossvit.CrossAttention': (Family('crossvit_tiny_240', size=240), 'blocks.0.fusion.1.attn', ONE_QUERY),
    'volo.ClassAttention': (CLASSES['models.volo.Attention'], 'post_network.0.attn', ONE_QUERY),
    'attention_pool.AttentionPoolLatent': (Family('vit_base_patch16_siglip_224', options=_VIT), 'attn_pool', POOLING),
    'attention_pool2d.AttentionPool2d': (Family('resnet50_clip'), 'head', POOLING),
    'xcit.XCA': (_XCIT, 'blocks.1.attn', CHANNELS),
    'davit.ChannelAttention': (CLASSES['models.davit.WindowAttention'], 'stages.1.blocks.0.1.attn', CHANNELS),
    'davit.ChannelAttentionV2': (
        Family('davit_base_fl', options=CLASSES['models.davit.WindowAttention'].options),
        'stages.2.blocks.0.channel_block.attn',
        CHANNELS,
    ),
    'edgenext.CrossCovarianceAttn': (Family('edgenext_xx_small'), 'stages.1.blocks.1.xca', CHANNELS),
    'gcvit.WindowAttentionGlobal': (
        CLASSES['models.gcvit.WindowAttentionGlobal'],
        'stages.0.blocks.1.attn',
        'its queries are computed from q_global, its keys and values from other inputs',
    ),
    'cait.TalkingHeadAttn': (_CAIT, 'blocks.0.attn', 'its logits are mixed before they are used'),
    'convit.GPSA': (
        CLASSES['models.convit.MHSA'],
        'blocks.0.attn',
        'GPSA.forward changes self.rel_indices'
        if CONVIT_CHANGES_ITSELF
        else 'its attention weights are mixed before they are',
    ),
    'efficientformer_v2.Attention2d': (
        CLASSES['models.efficientformer_v2.Attention2dDownsample'],
        'stages.3.blocks.2.token_mixer',
        'its logits are mixed before they are used (talking_head1)',
    ),
    'csatv2.SpatialTransformerBlock': (Family('csatv2', size=224), 'stages.0.0.attn.attn', BATCH),
    'volo.OutlookAttention': (CLASSES['models.volo.Attention'], 'network.0.0.attn', NO_PRODUCT),
    'coat.FactorAttnConvRelPosEnc': (
        Family('coat_tiny', options={'img_size': 64}),
        'serial_blocks1.0.factoratt_crpe',
        NO_PRODUCT,
    ),
    'mobilevit.LinearSelfAttention': (Family('mobilevitv2_050'), 'stages.2.1.transformer.0.attn', NO_PRODUCT),
    'efficientvim.HSMSSD': (Family('efficientvim_m1'), 'stages.0.blocks.0.mixer', NO_PRODUCT),
    'lambda_layer.LambdaLayer': (Family('lambda_resnet26t', size=128), 'stages.2.1.self_attn', NO_PRODUCT),
    'split_attn.RadixSoftmax': (Family('resnest14d'), 'layer1.0.conv2.rsoftmax', NO_PRODUCT),
    'global_context.GlobalContext': (Family('gcresnet33ts'), 'stages.0.0.attn', NO_PRODUCT),
    'selective_kernel.SelectiveKernelAttn': (Family('skresnet18'), 'layer1.0.conv1.attn', NO_PRODUCT),
}


@cache
def model_of(name: str) -> nn.Module:
    return REFUSED[name][0].create()


@pytest.mark.parametrize('name', first_of_each(REFUSED, lambda name: REFUSED[name][2]))
def test_a_module_asked_for_by_name_is_refused_with_its_reason(name: str) -> None:
    family, module, reason = REFUSED[name]
    model = model_of(name)
    assert type(model.get_submodule(module)).__name__ == name.split(' ')[0].split('.')[1]
    for call in (sem_timm.plan_model, sem_timm.patch_model):
        with refused(model, RefusedError, f"target '{module}'", f'{module}: {reason}'):
            call(model, 'external', target=module, input_size=family.input_size)


@pytest.mark.parametrize(
    'name',
    [
        'davit.ChannelAttention',
        'gcvit.WindowAttentionGlobal',
        'convit.GPSA',
        'csatv2.SpatialTransformerBlock',
        'volo.OutlookAttention',
        'crossvit.CrossAttention',
        'attention_pool.AttentionPoolLatent',
    ],
)
def test_a_plan_takes_the_rest_and_lists_what_it_refuses(name: str) -> None:
    family, module, reason = REFUSED[name]
    model = model_of(name)
    plan = sem_timm.plan_model(model, 'external', input_size=family.input_size)
    (refusal,) = [refusal for refusal in plan.refusals if refusal.name == module]
    assert refusal.class_name == name.split('.')[1] and refusal.reason.startswith(reason)
    assert module not in {site.name for site in plan}
    *_, listed = str(plan).split('Refused:\n')
    assert f'  {module} ({refusal.class_name}): {refusal.reason}' in listed.splitlines()


@pytest.mark.parametrize(
    'name', ['xcit.XCA', 'cait.TalkingHeadAttn', 'coat.FactorAttnConvRelPosEnc', 'edgenext.CrossCovarianceAttn']
)
def test_a_model_of_which_nothing_can_be_swapped(name: str) -> None:
    family, _, reason = REFUSED[name]
    model = model_of(name)
    with refused(model, RefusedError, type(model).__name__, 'can take external', 'refused', reason):
        sem_timm.patch_model(model, 'external', input_size=family.input_size)


@pytest.mark.parametrize('operation', ['efficient', 'linear', 'catt', 'caam', 'halo', 'monarch'])
@pytest.mark.parametrize(
    'name', first_of_each(['xcit.XCA', 'cait.ClassAttn', 'convit.GPSA', 'csatv2.SpatialTransformerBlock'])
)
def test_other_attentions_are_refused_there_too(name: str, operation: str) -> None:
    family, module, reason = REFUSED[name]
    model = model_of(name)
    with refused(model, RefusedError, f'{module}: {reason}'):
        sem_timm.patch_model(model, operation, target=module, input_size=family.input_size)


SMALL: dict[str, tuple[nn.Module, str]] = {
    'causal': (small_attention.Causal(), 'causal'),
    'logits mixed across heads': (small_attention.MixedLogits(), 'its logits are mixed before they are used (mix)'),
    'weights mixed across heads': (
        small_attention.MixedWeights(),
        'its attention weights are mixed before they are used (mix)',
    ),
    'queries that are parameters': (small_attention.Learned(), "its queries are not computed from the module's input"),
    'over the batch': (small_attention.OverTheBatch(), BATCH),
}


@pytest.mark.parametrize('name', SMALL)
def test_small_modules(name: str) -> None:
    attention, reason = SMALL[name]
    model = Model(attention)
    with refused(model, RefusedError, "target 'attention'", reason):
        sem_timm.patch_model(model, 'external', target='attention', input_size=(3, 32, 32))
    with refused(model, RefusedError, reason):
        sem_timm.patch_model(model, 'external', input_size=(3, 32, 32))


def test_a_mask_for_pairs_of_tokens_is_refused_by_what_cannot_honour_it() -> None:
    model = Model(small_attention.PairsFromTheInput())
    with refused(model, RefusedError, 'a mask (2, 1, 16, 16) for pairs of tokens, which external cannot honour'):
        sem_timm.patch_model(model, 'external', target='attention.inner', input_size=(3, 32, 32))
    (site,) = sem_timm.plan_model(model, 'catt', input_size=(3, 32, 32))
    assert site.masked


def test_a_mask_of_tokens_is_handed_on() -> None:
    model = Model(small_attention.PairsFromTheInput(pairwise=False))
    images = torch.randn(2, 3, 32, 32)
    (site,) = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert site.masked
    swap(model, 'external', input_size=(3, 32, 32))
    outputs(model, images)


@pytest.mark.parametrize('attention', [small_attention.Plain, small_attention.TokensFirst])
def test_the_order_of_axes_makes_no_difference(attention: type[nn.Module]) -> None:
    """Heads in front have memories of their own, heads folded into the batch share one."""
    model = Model(attention())
    (site,) = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert (site.num_heads, site.shape[-2:]) == ((2 if attention is small_attention.Plain else 1), (16, 8))
    swap(model, 'external', input_size=(3, 32, 32))
    images = torch.randn(3, 3, 48, 32)
    backward(model, images)
    assert_all_learn(model)
    (alone,) = outputs(model, images[:1])
    assert torch.allclose(alone, outputs(model, images)[0][:1], atol=1e-5)  # no image sees another


class TwoReaders(Projected):
    """Its attention weights have a second use."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = (q @ k.mT).softmax(-1)
        uses = {
            'matmul': lambda: attention @ v.flip(-1),
            'mean': attention.mean,
            'getattr': lambda: attention.mT.mean(),
        }
        return attention @ v + uses[self.use]()


@pytest.mark.parametrize('use', ['matmul', 'mean', 'getattr'])
def test_weights_that_are_used_twice(use: str) -> None:
    model = Model(TwoReaders(use))
    with refused(model, RefusedError, 'also used for something else', use):
        sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))


class WithContext(Projected):
    """Keys and values of tokens and of a context."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        both = torch.cat([x, context], 1)
        out = self.attend(self.heads(self.q(x)), self.heads(self.k(both)), self.heads(self.v(both)))
        return self.proj(out.transpose(1, 2).flatten(2))


class ContextModel(Model):
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        return self.head((tokens + self.attention(tokens, tokens.flip(1))).mean(1))


def test_a_context_that_the_new_core_would_not_look_at() -> None:
    model = ContextModel(WithContext())
    with refused(model, RefusedError, 'also computed from context'):
        sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert len(sem_timm.plan_model(model, 'efficient', input_size=(3, 32, 32))) == 1


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def test_attention_of_torch_itself_is_found() -> None:
    plan = sem_timm.plan_model(Model(Torchs()), 'external', input_size=(3, 32, 32))
    assert [site.name for site in plan] == ['attention.inner']


class Derived(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


@needs_argument('is_causal')
def test_attention_behind_super_is_found() -> None:
    assert [site.name for site in sem_timm.plan_model(Model(Derived(WIDTH, 2)), 'external', input_size=(3, 32, 32))]
