"""Keys without what all of them have in common: no change to softmax over them, and one to a linear kernel."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sem_timm
from sem_timm import OptionError
from sem_timm.layers import LinearAttention
from tests.layers.attention_inputs import TOKENS, both_modes, build, close, inputs, without_tokens

KEEP = torch.arange(TOKENS) % 4 != 1


def centred(k: Tensor) -> Tensor:
    return k - k.mean(-2, keepdim=True)


def drawn() -> tuple[Tensor, ...]:
    """Inputs (2, 3, 21, 6 or 5), with keys that have much in common."""
    q, k, v = inputs(build('linear'), 2, 3, queries=TOKENS)
    return q, k + 4 * torch.arange(6, dtype=torch.float64), v


def test_attentions_with_a_softmax_over_keys_do_not_change_by_it() -> None:
    q, k, v = drawn()
    close(scaled_dot_product_attention(q, centred(k), v), scaled_dot_product_attention(q, k, v))
    for name in ('efficient', 'monarch', 'halo'):
        core = build(name)
        close(core(q, centred(k), v), core(q, k, v))


def test_linear_attention_is_that_of_centred_keys() -> None:
    q, k, v = drawn()
    core, plain = build('linear', centre_keys=True), build('linear')
    for out in both_modes(lambda: core(q, k, v)):
        close(out, plain(q, centred(k), v))
        close(out, core(q, k + 3.0, v))
    assert (core(q, k, v) - plain(q, k, v)).abs().max() > 0.1
    assert not list(core.parameters())


@pytest.mark.parametrize('additive', [False, True])
def test_the_mean_is_that_of_the_keys_that_take_part(additive: bool) -> None:
    q, k, v = drawn()
    core = build('linear', centre_keys=True)
    expected = core(q, *without_tokens(KEEP, k, v))
    mask = torch.zeros(TOKENS, dtype=torch.float64).masked_fill(~KEEP, -torch.inf) if additive else KEEP
    k[..., ~KEEP, :] += 100
    for out in both_modes(lambda: core(q, k, v, attn_mask=mask)):
        close(out, expected)


def test_a_key_that_counts_twice_counts_twice_in_the_mean() -> None:
    q, k, v = (x[..., :3, :] for x in drawn())
    core = build('linear', centre_keys=True)
    mask = torch.tensor([0.0, torch.tensor(2.0).log(), 0.0], dtype=torch.float64)
    twice = [x[..., [0, 1, 1, 2], :] for x in (k, v)]
    torch.testing.assert_close(core(q, k, v, attn_mask=mask), core(q, *twice), rtol=1e-6, atol=1e-6)


def test_masks_of_pairs_are_refused_and_masks_of_everything_leave_numbers() -> None:
    q, k, v = drawn()
    core = build('linear', centre_keys=True)
    with pytest.raises(OptionError, match='never forms the pairs'):
        core(q, k, v, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
    assert core(q, k, v, attn_mask=torch.zeros(TOKENS, dtype=torch.bool)).isfinite().all()


def test_keys_that_are_all_alike_have_no_direction() -> None:
    q, k, v = drawn()
    alike = k[..., :1, :].expand_as(k)
    out = build('linear', centre_keys=True)(q, alike, v)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('masked', [False, True])
def test_narrow_types_keep_their_type_and_stay_near(dtype: torch.dtype, masked: bool) -> None:
    mask = KEEP if masked else None
    narrow = [x.to(dtype) for x in drawn()]
    out = LinearAttention(6, 5, centre_keys=True)(*narrow, attn_mask=mask)
    wanted = build('linear', centre_keys=True)(*(x.double() for x in narrow), attn_mask=mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0.05, atol=0.05)


def test_compiled_and_exported() -> None:
    core = LinearAttention(6, 5, centre_keys=True).eval()
    arguments = tuple(x.float() for x in drawn())
    expected = core(*arguments)
    compiled: Any = torch.compile(core, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*arguments), expected)
    tokens = {2: torch.export.Dim('tokens', min=2)}
    program = torch.export.export(core, arguments, dynamic_shapes={'q': tokens, 'k': tokens, 'v': tokens})
    fewer = tuple(x[:, :, :9] for x in arguments)
    torch.testing.assert_close(program.module()(*fewer), core(*fewer))


@pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')
def test_models_and_variants_take_the_option() -> None:
    model = timm.create_model('test_vit')
    sem_timm.patch_model(model, 'linear', centre_keys=True, own=True)
    cores = [module for module in model.modules() if isinstance(module, LinearAttention)]
    assert len(cores) == 6 and all(core.centre_keys for core in cores)
    assert 'centre_keys=True' in repr(cores[0]) and 'centre_keys' not in repr(LinearAttention(6))
    with pytest.raises(OptionError, match=r"'centre_keys' of attention 'efficient' is unknown"):
        sem_timm.plan_model(timm.create_model('test_vit'), 'efficient', centre_keys=True)
    with pytest.raises(OptionError, match=r'write centre_keys=True or centre_keys=False'):
        sem_timm.plan_model(timm.create_model('test_vit'), 'linear', centre_keys=1)
