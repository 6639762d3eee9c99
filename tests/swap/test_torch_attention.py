"""Attention of torch and of torchvision: read as its equivalent, swapped, compared, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MaxVit, VisionTransformer
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import sem_timm
from sem_timm import AttentionConfig, GuardError, RefusedError
from tests.lively import lively
from tests.refusals import refused
from tests.swap.small_attention import WIDTH, Model
from tests.swap.swapping import assert_all_learn, backward, swap
from tests.twins import trained


def swin(**options: Any) -> nn.Module:
    return SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    'VisionTransformer': lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
    'SwinTransformer': swin,
    'SwinTransformer V2': lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    'MaxVit': lambda: MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5),
}
SITES = {'VisionTransformer': 2, 'SwinTransformer': 4, 'SwinTransformer V2': 4, 'MaxVit': 4}


@pytest.mark.parametrize('name', MODELS)
def test_attention_is_swapped_learns_and_is_given_back(name: str) -> None:
    model, images = lively(MODELS[name]()).eval(), torch.randn(2, 3, 32, 32)
    base = model(images)
    swap(model, input_size=(3, 32, 32))
    assert len(sem_timm.patched_modules(model)) == SITES[name]
    first = model(images)
    assert not torch.equal(first, base)
    backward(model, images)
    assert_all_learn(model)
    assert not torch.equal(trained(model)(images), first)
    sem_timm.unpatch_model(model)
    assert torch.equal(model(images), base)


@pytest.mark.parametrize('name', MODELS)
def test_blocks_take_modules(name: str) -> None:
    model, images = lively(MODELS[name]()).eval(), torch.randn(2, 3, 32, 32)
    base = model(images)
    sem_timm.patch_model(model, input_size=(3, 32, 32))
    assert torch.equal(model(images), base) and not torch.equal(trained(model)(images), base)
    sem_timm.unpatch_model(model)
    assert torch.equal(model(images), base)


@pytest.mark.parametrize('size', [(16, 16), (36, 44), (64, 32)])
def test_windows_are_those_of_maps_of_any_size(size: tuple[int, int]) -> None:
    models = lively(swin()).eval(), swin().eval()
    swap(models[0], input_size=(3, 32, 32))
    swap(models[1], input_size=(3, *size))
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(1, 3, *size)
    assert torch.equal(models[0](images), models[1](images))


def test_a_core_like_the_old_one_gives_what_the_old_one_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the new core computes softmax attention, all around it is as before, scale and packed weights included."""
    model, images = lively(MODELS['VisionTransformer']()).eval(), torch.randn(2, 3, 32, 32)
    base = model(images)
    swap(model, AttentionConfig('efficient'), input_size=(3, 32, 32))
    for site in sem_timm.patched_modules(model):
        core = model.get_submodule(site.name).core
        core.forward = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(model(images), base, atol=1e-4, rtol=1e-4)


class Torchs(nn.Module):
    """torch's attention with some options and arguments, behind a module that calls it."""

    def __init__(self, *, options: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, **{'batch_first': True, **(options or {})})
        self.arguments = {'need_weights': False, **arguments}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, **self.arguments)[0]


TOKENS = 16
PAIRS = torch.ones(TOKENS, TOKENS).triu(1).bool()
PADDING = torch.zeros(2, TOKENS).bool().index_fill(1, torch.tensor([TOKENS - 1]), True)


@pytest.mark.parametrize('options', [{}, {'bias': False}, {'dropout': 0.1}])
def test_multi_head_attention_is_swapped(options: dict[str, Any]) -> None:
    model, images = Model(Torchs(options=options)).eval(), torch.randn(2, 3, 32, 32)
    swap(model, input_size=(3, 32, 32))
    backward(model.train(), images)
    assert_all_learn(model)
    x = torch.randn(2, TOKENS, WIDTH)
    with pytest.raises(GuardError, match=r'(?s)planned for other calls.*also computed from key'):
        model.attention.inner(x, x + 1, x, need_weights=False)


def test_only_queries_are_projected() -> None:
    model = Model(Torchs())
    plan = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    code = plan.code('attention.inner')
    assert f'self.in_proj_weight[:{WIDTH}]' in code and plan.computed == ()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    'weights are returned': (lambda: Torchs(need_weights=True), 'external', 'need_weights=False'),
    'pairs are masked': (lambda: Torchs(attn_mask=PAIRS), 'external', 'for pairs of tokens'),
    'keys that are no tokens': (lambda: Torchs(options={'add_bias_kv': True}), 'external', 'no tokens'),
    'a key of zeros': (lambda: Torchs(options={'add_zero_attn': True}), 'external', 'no tokens'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_no_other_core_has_is_refused(name: str) -> None:
    attention, operation, reason = REFUSED[name]
    model = Model(attention())
    with refused(model, RefusedError, 'attention.inner', reason):
        sem_timm.plan_model(model, operation, input_size=(3, 32, 32))


def test_masks_of_pairs_reach_cores_that_take_them() -> None:
    model, images = Model(Torchs(attn_mask=PAIRS)).eval(), torch.randn(2, 3, 32, 32)
    base = model(images)
    swap(model, 'caam', input_size=(3, 32, 32))
    core, seen = model.attention.inner.core, []
    core.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    assert not torch.allclose(model(images), base, atol=1e-3)
    # By the convention of cores True takes part.
    assert torch.equal(seen[0], ~PAIRS)


def test_padding_reaches_linear_cores() -> None:
    model, images = Model(Torchs(key_padding_mask=PADDING)).eval(), torch.randn(2, 3, 32, 32)
    swap(model, input_size=(3, 32, 32))
    seen: list[Tensor] = []
    model.attention.inner.core.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(images)
    assert torch.equal(seen[0], ~PADDING[:, None, None, :])


class Across(nn.Module):
    """Attends to other tokens than it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mean(1, keepdim=True).expand_as(x), x, x, need_weights=False)[0]


def test_other_queries_are_refused() -> None:
    model = Model(Across())
    with refused(model, RefusedError, 'its queries are computed from query, its keys and values from other inputs'):
        sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))


def test_encoder_layers_call_the_new_core_in_inference() -> None:
    layer = lively(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        base = model(x)
        swap(model, input_size=(TOKENS, WIDTH))
        first = model(x)
        assert not torch.allclose(first, base, atol=1e-3)
        assert not torch.allclose(trained(model)(x), first, atol=1e-3)
        sem_timm.unpatch_model(model)
        assert torch.equal(model(x), base)


class Processor:
    """Computes the attention of the module that it is handed."""

    def __call__(self, attention: Any, x: Tensor) -> Tensor:
        layers = attention.q, attention.k, attention.v
        q, k, v = (layer(x).reshape(x.shape[0], -1, 2, WIDTH // 2).transpose(1, 2) for layer in layers)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(x.shape[0], -1, v.shape[-1] * 2)


class Processed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.processor = Processor()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.processor(self, x, **options)


def test_attention_of_an_object_that_is_handed_the_module() -> None:
    model, images = Model(Processed()).eval(), torch.randn(2, 3, 32, 32)
    plan = sem_timm.plan_model(model, 'external', input_size=(3, 32, 32))
    assert plan.computed == () and len(plan.unread) == 4  # a width that is asked for does not need the values
    swap(model, plan)
    assert model(images).shape == (2, 5)
