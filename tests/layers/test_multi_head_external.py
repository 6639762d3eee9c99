"""The layer of EAMLP: its formula, its size, its place in timm's models."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from sem_timm.errors import OptionError
from sem_timm.layers.multi_head_external import MultiHeadExternalAttention
from tests.layers.attention_inputs import both_modes, close, in_forward_mode, trained
from tests.versions import free_batch, since_timm


def published(layer: MultiHeadExternalAttention, x: Tensor) -> Tensor:
    """The equations of EAMLP, head by head, with the optional norms where timm has them."""
    q = torch.einsum('bnc,kc->bnk', x, layer.q.weight) + (0 if layer.q.bias is None else layer.q.bias)
    outputs = []
    for head in q.split(layer.head_dim, dim=-1):
        scores = torch.exp(torch.einsum('bnd,sd->bns', layer.q_norm(head), layer.mk.weight) + layer.mk.bias)
        softmax = scores / scores.sum(1, keepdim=True)
        attention = softmax / (1e-9 + softmax.sum(2, keepdim=True))
        outputs.append(torch.einsum('bns,ds->bnd', attention, layer.mv.weight) + layer.mv.bias)
    out = torch.einsum('bnk,ck->bnc', layer.norm(torch.cat(outputs, dim=-1)), layer.proj.weight)
    return out if layer.proj.bias is None else out + layer.proj.bias


# Fewer tokens than channels and more: weights are folded for the latter only.
@pytest.mark.parametrize('tokens', [3, 29])
@pytest.mark.parametrize(('dim', 'heads', 'memory', 'options'), [
    (12, 3, 5, {}),
    (10, 1, 64, {}),
    (12, 4, 7, dict(qkv_bias=False, proj_bias=False)),
    (12, 3, 5, dict(qk_norm=True, norm_layer=nn.LayerNorm)),
    (12, 3, 5, dict(scale_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))),
])  # fmt: skip
def test_output_follows_the_published_equations(
    dim: int, heads: int, memory: int, options: dict[str, Any], tokens: int
) -> None:
    layer = trained(MultiHeadExternalAttention(dim, heads, memory=memory, dtype=torch.float64, **options))
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    for out in both_modes(lambda: layer(x)):
        close(out, published(layer, x).detach())


@pytest.mark.parametrize(('dim', 'heads', 'count'), [(256, 4, 533_888), (384, 6, 1_189_888), (448, 7, 1_616_192)])
def test_number_of_parameters_is_the_published_one(dim: int, heads: int, count: int) -> None:
    layer = MultiHeadExternalAttention(dim, heads, device='meta')
    assert sum(parameter.numel() for parameter in layer.parameters()) == count


def test_weights_are_folded_for_many_tokens_only_and_only_where_a_layer_is_its_weight() -> None:
    layer = MultiHeadExternalAttention(12, 3, memory=4)
    few, many = torch.randn(1, 12, 12), torch.randn(2, 8, 12)
    assert [layer._pays_to_fold(x) for x in (few, many)] == [False, True]
    assert not MultiHeadExternalAttention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm)._pays_to_fold(many)
    assert not MultiHeadExternalAttention(12, 3, memory=4, scale_norm=True, norm_layer=nn.LayerNorm)._pays_to_fold(many)
    seen: list[str] = []
    for name in ('q', 'mk', 'mv', 'proj'):
        hooked = copy.deepcopy(layer)
        hooked.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        close(hooked.double()(many.double()), copy.deepcopy(layer).double()(many.double()))
    assert seen == ['q', 'mk', 'mv', 'proj']
    wrapped = copy.deepcopy(layer)
    wrapped.q = nn.utils.parametrizations.weight_norm(wrapped.q)
    assert not wrapped._pays_to_fold(many)


LAYERS = ('q', 'q_norm', 'mk', 'mv', 'norm', 'proj')


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize(
    'kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook', 'forward']
)
def test_layers_with_hooks_or_a_forward_of_their_own_are_called(name: str, kind: str) -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, memory=4))
    x = torch.randn(2, 8, 12, requires_grad=True)
    assert layer._pays_to_fold(x)
    expected = layer(x).detach()
    seen: list[str] = []
    child = layer.get_submodule(name)
    if kind == 'forward':
        before = child.forward
        child.forward = lambda *args: (seen.append(name), before(*args))[1]  # type: ignore[method-assign]
    else:
        getattr(child, f'register_{kind}')(lambda *_: seen.append(name))
    assert not layer._pays_to_fold(x)
    out = layer(x)
    out.sum().backward()
    assert seen == [name]
    torch.testing.assert_close(out.detach(), expected)


def test_what_a_hook_keeps_is_not_overwritten() -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, memory=4))
    x = torch.randn(2, 40, 12)
    kept: list[Tensor] = []
    layer.mk.register_forward_hook(lambda *args: kept.append(args[2]))
    with torch.no_grad():
        layer(x)
    layer(x)
    torch.testing.assert_close(kept[0], kept[1])


class Quantized(Tensor):
    """A class of tensors that is not PyTorch's own."""


@pytest.mark.parametrize('name', ['q.weight', 'q.bias', 'mk.weight', 'mv.bias', 'proj.weight'])
def test_weights_are_folded_of_plain_tensors_only(name: str) -> None:
    layer = MultiHeadExternalAttention(12, 3, memory=4)
    x = torch.randn(2, 8, 12)
    child, attribute = name.split('.')
    weight = layer.get_parameter(name).detach()
    assert layer._pays_to_fold(x)
    setattr(layer.get_submodule(child), attribute, nn.Parameter(weight.as_subclass(Quantized)))
    assert not layer._pays_to_fold(x)


@pytest.mark.parametrize('tokens', [3, 29])
def test_parametrized_weights_are_read_through_their_parametrization(tokens: int) -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, memory=4, dtype=torch.float64))
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    tripled = copy.deepcopy(layer)
    with torch.no_grad():
        tripled.mv.weight.mul_(3)

    class Triple(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 3 * weight

    nn.utils.parametrize.register_parametrization(layer.mv, 'weight', Triple())
    assert not layer._pays_to_fold(x)
    for out in both_modes(lambda: layer(x)):
        close(out, tripled(x).detach())


@in_forward_mode
@pytest.mark.parametrize('tokens', [0, 3, 29])
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_function_transforms_give_what_they_should(tokens: int, frozen: bool, grad: bool) -> None:
    layer = trained(MultiHeadExternalAttention(6, 2, memory=3, dtype=torch.float64)).requires_grad_(not frozen)
    x = torch.randn(3, 2, tokens, 6, dtype=torch.float64)
    tangent, step = torch.randn_like(x[0]), 1e-5
    states = {key: torch.stack([parameter, 2 * parameter]) for key, parameter in layer.named_parameters()}
    with torch.set_grad_enabled(grad):
        close(vmap(layer)(x), torch.stack([layer(sample) for sample in x]))
        twice = functional_call(layer, {key: value[1] for key, value in states.items()}, (x[0],))
        both = vmap(lambda state: functional_call(layer, state, (x[0],)))(states)
        close(both, torch.stack([layer(x[0]), twice]))
        derivative = jvp(layer, (x[0],), (tangent,))[1]
        numerical = (layer(x[0] + step * tangent) - layer(x[0] - step * tangent)) / (2 * step)
    # The error of the difference quotient.
    torch.testing.assert_close(derivative, numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('tokens', [3, 29])
def test_gradients_are_the_numerical_ones_and_reach_every_parameter(tokens: int) -> None:
    layer = trained(MultiHeadExternalAttention(6, 2, memory=3, dtype=torch.float64))
    x = torch.randn(1, tokens, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    # The softmax over tokens takes away what is the same for all of them, among it the bias of the memory of keys.
    still = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() < 1e-10}
    assert still == {'q.bias', 'mk.bias'}


@pytest.mark.parametrize('tokens', [5, 29])
def test_padded_tokens_are_as_good_as_absent(tokens: int) -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, memory=4, dtype=torch.float64))
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    keep = torch.arange(tokens) < tokens - 2
    for mask in (keep, keep.view(1, 1, 1, -1), keep.expand(2, 1, 1, -1)):
        for out in both_modes(lambda mask=mask: layer(x, attn_mask=mask)):
            close(out[:, :-2], layer(x[:, :-2]).detach())


def test_dropout_acts_in_training_alone() -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(2, 40, 12)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(0)
    dropped = layer.train()(x)
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    layer.proj_drop.p = 0.0
    assert not torch.equal(layer(x), layer(x))


@since_timm('1.0.16', 'attn_layer= of its transformers')
def test_timm_builds_a_vision_transformer_with_it() -> None:
    model = timm.create_model(
        'vit_tiny_patch16_224', attn_layer=MultiHeadExternalAttention, depth=2, img_size=64, num_classes=3
    )
    assert sum(isinstance(module, MultiHeadExternalAttention) for module in model.modules()) == 2
    assert model.blocks[0].attn.num_heads == 12 and model.blocks[0].attn.q.bias is not None
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.device('meta'):
        small = timm.create_model('vit_small_patch16_224', attn_layer=MultiHeadExternalAttention)
    attention = sum(p.numel() for name, p in small.named_parameters() if '.attn.' in name)
    assert attention == 12 * 1_189_888


@pytest.mark.parametrize('tokens', [5, 40])
def test_narrow_types_stay_near(tokens: int) -> None:
    layer = MultiHeadExternalAttention(12, 3)
    x = torch.randn(2, tokens, 12)
    expected = layer(x).detach()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('grad', [False, True])
def test_compiles_whole_exports_with_a_free_batch_and_copies(grad: bool) -> None:
    layer = trained(MultiHeadExternalAttention(12, 3, memory=4, dtype=torch.float64)).eval()
    x = torch.randn(4, 9, 12, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        close(torch.compile(layer, fullgraph=True, backend='aot_eager', dynamic=True)(x), expected)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: free_batch()},)).module()
        close(program(x), expected)
        close(program(x[:2]), layer(x[:2]))
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert layer(x[:0]).shape == (0, 9, 12)
    assert MultiHeadExternalAttention(12, 3, device='meta')(torch.empty(2, 9, 12, device='meta')).shape == (2, 9, 12)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(num_heads=5), r'num_heads=5 does not divide dim=12\. What does: 1, 2, 3, 4, 6, 12'),
    (dict(num_heads=0), 'num_heads=0'),
    (dict(dim=0), 'dim=0'),
    (dict(memory=0), 'memory=0'),
    (dict(qk_norm=True), 'need a norm_layer'),
    (dict(scale_norm=True), 'need a norm_layer'),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MultiHeadExternalAttention(**{'dim': 12, 'num_heads': 3, **options})


def test_masks_it_cannot_apply_are_refused() -> None:
    layer = MultiHeadExternalAttention(12, 3)
    x = torch.randn(2, 5, 12)
    with pytest.raises(OptionError, match='is_causal=False'):
        layer(x, is_causal=True)
    with pytest.raises(OptionError, match=r'never forms the pairs'):
        layer(x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(OptionError, match='does not broadcast'):
        layer(x, attn_mask=torch.ones(2, 3, 1, 5, dtype=torch.bool))
