"""What people put around or in place of a packed projection goes on working after a swap, all of its rows computed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm

import sem_timm
from tests.swap.classes import CLASSES
from tests.swap.swapping import swap, swapped
from tests.twins import assert_equal
from tests.versions import since_torch

VIT = CLASSES['layers.attention.Attention']


class LoRA(nn.Linear):
    """A low-rank adapter that is a linear layer itself."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.mT @ self.up.mT


def queries(model: nn.Module, x: Tensor) -> Tensor:
    """What the new core of the first block gets."""
    found: list[Tensor] = []
    attention = model.get_submodule('blocks.0.attn')
    hook = attention.get_submodule('core').register_forward_pre_hook(lambda module, args: found.append(args[0]))
    attention(x)
    hook.remove()
    return found[0]


def expected_queries(projection: nn.Module, x: Tensor, heads: int) -> Tensor:
    return projection(x)[..., : x.shape[-1]].unflatten(-1, (heads, -1)).transpose(1, 2)


TOKENS = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))


def test_an_adapter_put_on_after_the_swap() -> None:
    model = swapped(VIT)
    attention: Any = model.get_submodule('blocks.0.attn')
    attention.qkv = LoRA(attention.qkv)
    found = queries(model, TOKENS)
    assert_equal([found], [expected_queries(attention.qkv, TOKENS, attention.num_heads)])
    found.square().sum().backward()
    assert attention.qkv.down.grad.any() and attention.qkv.up.grad.any()


@pytest.mark.parametrize('reparametrize', [weight_norm, lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
def test_a_weight_that_hooks_compute(reparametrize: Any) -> None:
    model = VIT.create()
    attention: Any = model.get_submodule('blocks.0.attn')
    reparametrize(attention.qkv)
    plan = sem_timm.plan_model(model, 'external')
    assert not plan.unread
    swap(model, plan)
    with torch.no_grad():
        next(p for n, p in attention.qkv.named_parameters() if n in ('weight_g', 'weight_orig')).mul_(2)
    assert_equal([queries(model, TOKENS)], [expected_queries(attention.qkv, TOKENS, attention.num_heads)])


def test_hooks_on_the_projection_are_called() -> None:
    model = swapped(VIT)
    attention: Any = model.get_submodule('blocks.0.attn')
    plain = queries(model, TOKENS)
    attention.qkv.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(queries(model, TOKENS), 2 * plain)


def test_dynamic_quantisation_after_the_swap() -> None:
    model = swapped(VIT)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch is about to move it elsewhere
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert model(VIT.images()).isfinite().all()


class Int8Weight(Tensor):
    """A weight that a plain linear layer can multiply by, and nothing can take rows of."""

    scale: Tensor
    numbers: Tensor

    @staticmethod
    def __new__(cls, scale: Tensor, numbers: Tensor) -> Int8Weight:
        made: Int8Weight = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.scale, made.numbers = scale, numbers
        return made

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return nn.Parameter(cls(scale, (weight.detach() / scale).round().to(torch.int8)), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].scale, args[0].numbers)
        raise NotImplementedError(f'{func} of quantised weights')


@pytest.mark.parametrize('is_swapped', [False, True])
def test_weights_that_are_quantised_in_a_plain_layer(is_swapped: bool) -> None:
    model = swapped(VIT) if is_swapped else VIT.create()
    attention: Any = model.get_submodule('blocks.0.attn')
    attention.qkv.weight = Int8Weight.of(attention.qkv.weight)
    assert type(attention.qkv) is nn.Linear
    if not is_swapped:
        swap(model, 'external', input_size=VIT.input_size)
    with torch.no_grad():
        found = queries(model, TOKENS)
        assert_equal([found], [expected_queries(attention.qkv, TOKENS, attention.num_heads)])


@since_torch('2.5', 'export that shows layers as what they are')
def test_an_export_computes_the_rows_that_are_read() -> None:
    attention: Any = swapped(VIT).get_submodule('blocks.0.attn')
    exported = torch.export.export(attention, (TOKENS,), strict=False)
    outputs = [node.meta['val'] for node in exported.graph.nodes if 'linear' in str(node.target)]
    assert [output.shape[-1] for output in outputs] == [64, 64]  # queries alone, and the last projection
