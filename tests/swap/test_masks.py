"""Attention masks given to a swapped module: honoured where that has a meaning, refused where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import GuardError, OptionError
from tests.families import Family
from tests.swap.classes import CLASSES
from tests.swap.swapping import swap, swapped

VIT = CLASSES['layers.attention.Attention']
LINEAR = ('external', 'eamlp', 'efficient', 'linear')
ALL = (*LINEAR, 'halo', 'monarch', 'catt', 'caam')


def attention(operation: str) -> Any:
    """A swapped attention module of timm, and tokens for it: a class token and a grid of 4 x 4."""
    model = swapped(VIT, operation)
    new = model.blocks[0].attn.core
    for parameter in new.parameters():  # some parts of new modules start at zero
        nn.init.normal_(parameter, std=0.7, generator=torch.Generator().manual_seed(4))
    return model.blocks[0].attn, torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(3))


def run(module: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return module(tokens, **kwargs)


@pytest.mark.parametrize('operation', ALL)
@pytest.mark.parametrize('additive', [False, True], ids=['bool', 'additive'])
def test_masked_tokens_do_not_influence_the_others(operation: str, additive: bool) -> None:
    module, tokens = attention(operation)
    takes_part = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    takes_part[0, ..., 12:] = False
    takes_part[1, ..., [3, 7]] = False
    others = tokens.clone()
    others[~takes_part[:, 0, 0]] += 5.0
    mask = torch.zeros(takes_part.shape).masked_fill(~takes_part, float('-inf')) if additive else takes_part
    first, second = (run(module, x, attn_mask=mask)[takes_part[:, 0, 0]] for x in (tokens, others))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    unmasked, changed = (run(module, x)[takes_part[:, 0, 0]] for x in (tokens, others))
    assert (unmasked - changed).abs().max() > 1e-2
    assert (unmasked - first).abs().max() > 1e-3


def test_with_a_softmax_over_slots_tokens_do_not_see_each_other() -> None:
    module = swapped(VIT, norm='softmax').blocks[0].attn
    tokens = torch.randn(2, 17, 64)
    mask = torch.zeros(2, 1, 1, 17, dtype=torch.bool)
    assert torch.equal(run(module, tokens), run(module, tokens, attn_mask=mask))


@pytest.mark.parametrize('operation', ALL)
def test_a_mask_of_ones_changes_nothing(operation: str) -> None:
    module, tokens = attention(operation)
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    torch.testing.assert_close(run(module, tokens, attn_mask=mask), run(module, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('operation', [*LINEAR, 'halo', 'monarch'])
@pytest.mark.parametrize('shape', [(17, 17), (2, 1, 17, 17), (1, 2, 17, 17)])
def test_a_mask_for_pairs_of_tokens_raises(operation: str, shape: tuple[int, ...]) -> None:
    module, tokens = attention(operation)
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
        with pytest.raises(OptionError) as caught:
            run(module, tokens, attn_mask=mask)
        message = str(caught.value)
        assert str(tuple(shape)) in message and '(B, 1, 1, N)' in message and 'key-padding' in message


@pytest.mark.parametrize('operation', ['catt', 'caam'])
def test_quadratic_attention_honours_pairs(operation: str) -> None:
    """A token that may see itself alone is not influenced by any other."""
    module, tokens = attention(operation)
    others = tokens.clone()
    others[:, 1:] += 1.0
    pairs = torch.eye(17, dtype=torch.bool)
    first, second = (run(module, x, attn_mask=pairs)[:, 0] for x in (tokens, others))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('operation', ALL)
def test_causal_calls_raise(operation: str) -> None:
    module, tokens = attention(operation)
    with pytest.raises(GuardError, match='causal') as caught:
        run(module, tokens, is_causal=True)
    assert 'unpatch_model(model)' in str(caught.value)


def test_masks_given_to_the_model() -> None:
    model = swapped(VIT)
    images, mask = VIT.images(), torch.ones(2, 1, 1, 17, dtype=torch.bool)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(model.forward_features(images, attn_mask=mask), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(OptionError, match='key-padding'):
            model.forward_features(images, attn_mask=torch.zeros(2, 1, 17, 17))
        with pytest.raises(GuardError, match='causal'):
            model.forward_features(images, is_causal=True)


@pytest.mark.parametrize(
    ('name', 'argument', 'shape'),
    [
        ('models.beit.Attention', 'shared_rel_pos_bias', (1, 2, 17, 17)),
        ('models.vision_transformer_relpos.RelPosAttention', 'shared_rel_pos', (1, 3, 16, 16)),
        ('models.maxxvit.AttentionCl', 'shared_rel_pos', (1, 1, 4, 4)),
        ('models.maxxvit.Attention2d', 'shared_rel_pos', (1, 2, 16, 16)),
    ],
)
def test_a_bias_that_was_not_there_when_planned_is_dropped_if_it_is_learned(
    name: str, argument: str, shape: tuple[int, ...]
) -> None:
    family = CLASSES[name]
    model = swapped(family)
    site = sem_timm.patched_modules(model)[0].name
    seen: list[Any] = []
    hook = model.get_submodule(site).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(family.images())
    hook.remove()
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = model.get_submodule(site)
    if name == 'models.beit.Attention':  # the others have a bias of their own, and never look at this one
        with pytest.raises(GuardError, match='mask'):  # for all that can be seen
            run(module, seen[0], **{argument: bias})
    bias.requires_grad_()
    assert torch.equal(run(module, seen[0], **{argument: bias}), run(module, seen[0]))


def test_a_window_mask_makes_no_difference() -> None:
    """External attention forms no pairs that a mask of shifted windows would switch off."""
    family = CLASSES['models.swin_transformer.WindowAttention']
    model = swap(family.create(strict_img_size=True))
    shifted = model.layers[0].blocks[1]
    tokens = torch.randn(32, 16, 24)
    assert shifted.attn_mask is not None
    assert torch.equal(run(shifted.attn, tokens, mask=shifted.attn_mask), run(shifted.attn, tokens))


def test_samples_that_are_padded_to_one_length() -> None:
    """NaFlexViT makes a mask for pairs of tokens from which of them are padding; images of one size need none."""
    family = Family('naflexvit_base_patch16_gap', options={'embed_dim': 64, 'depth': 2, 'num_heads': 2})
    model = swapped(family)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing='ij')
    padded = {
        'patches': torch.randn(2, 16, 768),
        'patch_coord': torch.stack((rows, columns), -1).reshape(1, 16, 2).repeat(2, 1, 1),
        'patch_valid': torch.arange(16)[None] < torch.tensor([[16], [8]]),
    }
    with torch.no_grad():
        assert model(family.images()).isfinite().all()
        with pytest.raises(OptionError, match='key-padding'):
            model(padded)
