"""A core that is handed the projection of its queries gives what it gives for the queries."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.swap.classes import CLASSES
from tests.swap.swapping import swap, swapped

VIT = CLASSES['layers.attention.Attention']
MANY = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0))
FEW = MANY[:1, :20]


def attention_of(model: nn.Module) -> Any:
    return model.get_submodule('blocks.0.attn')


def counted(attention: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the core from now on took the projection together with its memory."""
    calls: list[bool] = []
    attend = sem_timm.ExternalAttention.attend_folded

    def counting(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        out = attend(self, x, weight, bias)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(sem_timm.ExternalAttention, 'attend_folded', counting)
    return calls


@pytest.mark.parametrize('options', [{}, {'qkv_bias': False}, {'num_heads': 1}])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_the_result_is_that_for_queries(options: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attention_of(swapped(VIT, create=options)).to(dtype)
    calls = counted(attention, monkeypatch)
    with torch.no_grad():
        found = attention(MANY.to(dtype))
    expected = attention(MANY.to(dtype))
    assert calls == [True, False]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_few_tokens_gradients_and_masks_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attention_of(swapped(VIT))
    calls = counted(attention, monkeypatch)
    with torch.no_grad():
        attention(FEW)
        attention(MANY, attn_mask=torch.ones(2, 1, 1, 100, dtype=torch.bool))  # not asked at all
    attention(MANY)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        attention(MANY)
    assert calls == [False, False, False]


@pytest.mark.parametrize('hooked', ['core', 'qkv'])
def test_hooks_see_calls(hooked: str) -> None:
    attention = attention_of(swapped(VIT))
    seen: list[Tensor] = []
    attention.get_submodule(hooked).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        attention(MANY)
    assert len(seen) == 1


def test_copies_and_pickles() -> None:
    model = swapped(VIT)
    with torch.no_grad():
        expected = attention_of(model)(MANY)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(attention_of(other)(MANY), expected)


def test_where_queries_are_changed_they_are_handed_over() -> None:
    for options in ({'qk_norm': True}, {'scale_attn_norm': True}):
        model = VIT.create(**options)
        plan = sem_timm.plan_model(model, 'external', input_size=VIT.input_size)
        assert ('attend_projected' in plan.code('blocks.0.attn')) is ('qk_norm' not in options)
    swin = CLASSES['models.swin_transformer.WindowAttention'].create()
    assert 'self.core(' in sem_timm.plan_model(swin, 'external').code('layers.0.blocks.0.attn')


@pytest.mark.parametrize('operation', ['efficient', 'linear', 'halo', 'monarch'])
def test_cores_that_read_keys_get_queries(operation: str) -> None:
    plan = sem_timm.plan_model(VIT.create(), operation, input_size=VIT.input_size)
    assert 'attend_projected' not in plan.code('blocks.0.attn')


def test_compiled_without_graph_breaks() -> None:
    model = VIT.create()
    swap(model, 'external', input_size=VIT.input_size)
    attention = attention_of(model)
    with torch.no_grad():
        expected = attention(MANY)
        found = torch.compile(attention, fullgraph=True, backend='eager')(MANY)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
