"""External attention: its formula, its two ways of computing, its scale."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

from sem_timm.errors import OptionError
from sem_timm.layers import external
from sem_timm.layers.external import ExternalAttention
from tests.layers.attention_inputs import both_modes, close, in_forward_mode, inputs, trained, without_tokens


def published(q: Tensor, mk: Tensor, mv: Tensor) -> Tensor:
    """The equations of the paper for one head, q (B, N, d)."""
    scores = torch.einsum('bnd,ds->bns', q, mk)
    softmax = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
    attention = softmax / (1e-9 + softmax.sum(2, keepdim=True))
    return torch.einsum('bns,sv->bnv', attention, mv)


@pytest.mark.parametrize(('batch', 'tokens', 'width', 'value', 'memory'), [
    (1, 1, 1, 1, 1), (2, 7, 5, 3, 4), (3, 35, 8, 8, 64), (1, 197, 13, 7, 9),
])  # fmt: skip
def test_shared_memory_follows_the_published_equations(
    batch: int, tokens: int, width: int, value: int, memory: int
) -> None:
    core = trained(ExternalAttention(width, value, memory=memory, dtype=torch.float64))
    (q,) = inputs(core, batch, queries=tokens)
    for out in both_modes(lambda: core(q)):
        close(out, published(q, core.mk, core.mv).detach())


@pytest.mark.parametrize('part_bytes', [1, 3000, 1 << 30])
@pytest.mark.parametrize('windows', [0, 4])
def test_memories_per_head_follow_the_published_equations(
    windows: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, 'PART_BYTES', part_bytes)
    axis = -4 if windows else -3
    core = trained(ExternalAttention(5, 3, 4, axis, memory=6, dtype=torch.float64))
    (q,) = inputs(core, 2, 4, *([windows] if windows else []), queries=11)
    for mask in (None, torch.arange(11).view(1, 1, *([1] * bool(windows)), 1, 11) < 8):
        for out in both_modes(lambda mask=mask: core(q, attn_mask=mask)):
            for head in range(4):
                rows = q[:, head].flatten(0, -3)[..., :8, :] if mask is not None else q[:, head].flatten(0, -3)
                expected = published(rows, core.mk[head], core.mv[head]).detach()
                close(out[:, head].flatten(0, -3)[..., : rows.shape[-2], :], expected)


def test_softmax_norm_runs_over_the_slots_alone() -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4, norm='softmax', dtype=torch.float64))
    (q,) = inputs(core, 2, 2, queries=7)
    scores = torch.exp(torch.einsum('bhnd,hds->bhns', q, core.mk))
    expected = torch.einsum('bhns,hsv->bhnv', scores / scores.sum(-1, keepdim=True), core.mv).detach()
    mask = torch.arange(7).view(1, 1, 1, 7) < 5
    for given in (None, mask):
        for out in both_modes(lambda given=given: core(q, attn_mask=given)):
            close(out, expected)


def test_masked_tokens_are_as_good_as_absent() -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4, dtype=torch.float64))
    (q,) = inputs(core, 3, 2, queries=9)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    expected = core(*without_tokens(keep, q)).detach()
    for mask in (keep, torch.zeros(9, dtype=torch.float64).masked_fill(~keep, -torch.inf)):
        for out in both_modes(lambda mask=mask: core(q, attn_mask=mask)):
            close(*without_tokens(keep, out), expected)
            assert torch.isfinite(out).all()


def test_numbers_in_a_mask_are_added_to_the_logits_of_tokens() -> None:
    core = trained(ExternalAttention(5, 3, memory=4, dtype=torch.float64))
    (q,) = inputs(core, 2, queries=9)
    bias = torch.randn(2, 1, 9, dtype=torch.float64)
    scores = torch.exp(torch.einsum('bnd,ds->bns', q, core.mk) + bias.mT)
    attention = scores / scores.sum(1, keepdim=True)
    expected = (attention / (1e-9 + attention.sum(2, keepdim=True)) @ core.mv).detach()
    for out in both_modes(lambda: core(q, attn_mask=bias)):
        close(out, expected)


@pytest.mark.parametrize('shift', [-300.0, 0.0, 300.0])
def test_large_logits_stay_finite(shift: float) -> None:
    core = ExternalAttention(4, memory=3)
    with torch.no_grad():
        core.mk.fill_(25.0)
    q = torch.randn(2, 5, 4) + shift
    for out in both_modes(lambda: core(q)):
        assert torch.isfinite(out).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_statistics_over_many_tokens_are_taken_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    core = ExternalAttention(4, memory=2, dtype=torch.float32 if autocast else dtype)
    with torch.no_grad():
        core.mk.zero_()
        core.mv.fill_(1.0)
    # Every token has the share 1/N; in the narrow types its sum over tokens stalls, and float16 loses 1/N itself.
    q = torch.zeros(1, 60_000, 4, dtype=torch.float32 if autocast else dtype)
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        for out in both_modes(lambda: core(q)):
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), torch.ones_like(out).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize('memory', [1, 4, 16, 64, 128])
@pytest.mark.parametrize('norm', ['double', 'softmax'])
def test_initial_logits_and_outputs_have_about_unit_variance(memory: int, norm: Any) -> None:
    torch.manual_seed(0)
    core = ExternalAttention(64, num_heads=8, memory=memory, norm=norm)
    q = torch.randn(2, 8, 500, 64)
    assert float((q @ core.mk).detach().std()) == pytest.approx(1, abs=0.1)
    assert float(core(q).detach().square().mean().sqrt()) == pytest.approx(1, abs=0.15)


def test_scaling_multiplies_the_output() -> None:
    core = ExternalAttention(8, 6, 3, memory=5)
    q = torch.randn(2, 3, 40, 8)
    before = core(q)
    core.scale_output(3.0)
    torch.testing.assert_close(core(q), 3 * before)
    assert core.mv.requires_grad


def test_inference_writes_into_no_input() -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4))
    q = torch.randn(3, 2, 9, 5)
    mask = torch.zeros(3, 1, 1, 9)
    before = q.clone(), {key: value.clone() for key, value in core.state_dict().items()}
    with torch.inference_mode():
        core(q)
        core(q, attn_mask=mask)
    assert torch.equal(q, before[0]) and not mask.any()
    assert all(torch.equal(value, before[1][key]) for key, value in core.state_dict().items())


def test_frozen_memories_still_pass_gradients_to_the_queries() -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4, dtype=torch.float64)).requires_grad_(False)
    q = inputs(core, 2, 2, queries=6)[0].requires_grad_()
    assert torch.autograd.gradcheck(core, (q,))


@in_forward_mode
def test_derivatives_of_memories_in_forward_mode_are_those_of_a_linear_map() -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4, dtype=torch.float64))
    (q,) = inputs(core, 2, 2, queries=6)
    tangent = torch.randn_like(core.mv)
    with torch.no_grad(), forward_ad.dual_level():
        out = functional_call(core, {'mv': forward_ad.make_dual(core.mv.detach(), tangent)}, (q,))
        derivative = forward_ad.unpack_dual(out).tangent
        close(derivative, functional_call(core, {'mv': tangent}, (q,)))


def test_compiled_maps_over_inputs() -> None:
    torch.compiler.reset()
    core = trained(ExternalAttention(5, 3, 2, memory=4, dtype=torch.float64)).requires_grad_(False)
    (q,) = inputs(core, 3, 2, 2, queries=6)
    with torch.no_grad():
        mapped = torch.compile(vmap(core.forward), fullgraph=True, backend='aot_eager')
        close(mapped(q), torch.stack([core(x) for x in q]))


class Watched(Tensor):
    """A tensor that notes the operations that write into memory at hand."""

    written: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (function.__name__.endswith('_') and not function.__name__.startswith('__')) or 'out' in (kwargs or {}):
            cls.written.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize('watched', ['q', 'mk', 'mv'])
def test_inference_writes_into_no_tensor_of_another_class(watched: str) -> None:
    core = trained(ExternalAttention(5, 3, 2, memory=4, dtype=torch.float64))
    (q,) = inputs(core, 2, 2, queries=6)
    expected = core(q).detach()
    if watched == 'q':
        q = q.as_subclass(Watched)
    else:
        setattr(core, watched, nn.Parameter(core.get_parameter(watched).detach().as_subclass(Watched)))
    Watched.written.clear()
    with torch.inference_mode():
        out = core(q)
    assert isinstance(out, Watched) and not Watched.written
    close(out.as_subclass(Tensor), expected)


def test_parameters_are_two_memories_of_known_shape() -> None:
    shared, own = ExternalAttention(6, 5, memory=7), ExternalAttention(6, 5, 3, memory=7)
    assert {key: tuple(value.shape) for key, value in shared.state_dict().items()} == {'mk': (6, 7), 'mv': (7, 5)}
    assert {key: tuple(value.shape) for key, value in own.state_dict().items()} == {'mk': (3, 6, 7), 'mv': (3, 7, 5)}
    assert "memory=7, norm='double'" in repr(own)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(memory=0), 'memory=0'),
    (dict(memory=1.5), 'memory=1.5'),
    (dict(norm='doubel'), r"norm='doubel' is unknown\. Close: double"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExternalAttention(8, **options)
