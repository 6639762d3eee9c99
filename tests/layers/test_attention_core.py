"""What holds for every attention core: shapes, heads, masks, types."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.attention_cores import attention_core_class
from tests.layers.attention_inputs import NAMES, TOKENS, both_modes, build, close, inputs

LINEAR = ('external', 'efficient', 'linear', 'halo', 'monarch')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('leading', [(), (3,), (2, 3), (2, 3, 2), (0, 3)])
def test_any_leading_axes_give_outputs_of_the_width_of_values(name: str, leading: tuple[int, ...]) -> None:
    core = build(name)
    for out in both_modes(lambda: core(*inputs(core, *leading, queries=TOKENS))):
        assert out.shape == (*leading, TOKENS, 5)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('axis', [-3, -4])
def test_heads_with_parameters_of_their_own_equal_one_core_per_head(name: str, axis: int) -> None:
    core = build(name, num_heads=3, head_axis=axis)
    arguments = inputs(core, *((2, 3) if axis == -3 else (2, 3, 4)), queries=TOKENS)
    for out in both_modes(lambda: core(*arguments)):
        for head in range(3):
            single = build(name)
            single.load_state_dict({key: value[head] for key, value in core.state_dict().items()})
            close(out[:, head], single(*(x[:, head] for x in arguments)).detach())


@pytest.mark.parametrize('name', NAMES)
def test_shared_parameters_do_not_care_where_heads_are(name: str) -> None:
    core = build(name)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    for out, folded in zip(
        both_modes(lambda: core(*arguments)), both_modes(lambda: core(*(x.flatten(0, 1) for x in arguments)))
    ):
        close(out.flatten(0, 1), folded)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('num_heads', [1, 3])
def test_memory_layout_of_inputs_does_not_matter(name: str, num_heads: int) -> None:
    core = build(name, num_heads=num_heads)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    expected = core(*arguments).detach()
    for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        strided = [x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist()) for x in arguments]
        assert not strided[0].is_contiguous()
        for out in both_modes(lambda strided=strided: core(*strided)):
            close(out, expected)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'halo'])
def test_no_tokens_give_no_outputs(name: str) -> None:
    core = build(name, num_heads=3)
    for out in both_modes(lambda: core(*inputs(core, 2, 3, queries=0))):
        assert out.shape == (2, 3, 0, 5)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('additive', [False, True])
@pytest.mark.parametrize('shape', [(TOKENS,), (2, 1, 1, TOKENS), (2, 3, 1, TOKENS), (1, 1, 1, 1)])
def test_padding_masks_of_every_broadcastable_shape_hide_tokens(
    name: str, additive: bool, shape: tuple[int, ...]
) -> None:
    core = build(name, num_heads=3)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 4:7] = shape[-1] == 1
    given = torch.zeros(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    if core.takes_pairwise_mask:
        given = torch.atleast_2d(given)
    changed = [x.clone() for x in arguments]
    for x in changed:
        x[..., 4:7, :] += 3 if shape[-1] > 1 else 0
    for out, other in zip(
        both_modes(lambda: core(*arguments, attn_mask=given)), both_modes(lambda: core(*changed, attn_mask=given))
    ):
        close(out[..., :4, :], other[..., :4, :])
        close(out[..., 7:, :], other[..., 7:, :])
        assert torch.isfinite(out).all()


@pytest.mark.parametrize('name', LINEAR)
def test_a_mask_that_hides_everything_leaves_finite_numbers(name: str) -> None:
    core = build(name, num_heads=3)
    nothing = torch.zeros(2, 1, 1, TOKENS, dtype=torch.bool)
    for out in both_modes(lambda: core(*inputs(core, 2, 3, queries=TOKENS), attn_mask=nothing)):
        assert torch.isfinite(out).all()


@pytest.mark.parametrize('name', NAMES)
def test_pairwise_masks_are_honoured_or_refused(name: str) -> None:
    core = build(name)
    arguments = inputs(core, 2, 3, queries=TOKENS)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert core.takes_pairwise_mask == (name not in LINEAR)
    if core.takes_pairwise_mask:
        changed = [x.clone() for x in arguments]
        for x in changed:
            x[..., -1, :] += 3
        close(core(*arguments, attn_mask=causal)[..., :-1, :], core(*changed, attn_mask=causal)[..., :-1, :])
        return
    with pytest.raises(OptionError, match=r'(?s)never forms the pairs.*\(B, 1, 1, N\)'):
        core(*arguments, attn_mask=causal)


@pytest.mark.parametrize('name', LINEAR)
@pytest.mark.parametrize('shape', [(TOKENS + 1,), (5, 1, 1, TOKENS), (2, 2, 1, TOKENS), (1, 2, 3, 1, TOKENS)])
def test_masks_of_other_sizes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    core = build(name)
    with pytest.raises(OptionError, match=r'does not broadcast to .*\(B, 1, 1, N\)'):
        core(*inputs(core, 2, 3, queries=TOKENS), attn_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_narrow_types_keep_their_type_and_stay_near(
    name: str, dtype: torch.dtype, autocast: bool, masked: bool
) -> None:
    core = build(name, num_heads=3).float() if autocast else build(name, num_heads=3).to(dtype)
    arguments = inputs(core, 2, 3, queries=TOKENS, dtype=torch.float32 if autocast else dtype)
    mask = torch.arange(TOKENS) < TOKENS - 3
    mask = mask.view(1, 1, 1, -1) if masked else None
    expected = copy.deepcopy(core).double()(*(x.double() for x in arguments), attn_mask=mask).detach()
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        for out in both_modes(lambda: core(*arguments, attn_mask=mask)):
            assert out.dtype == dtype
            # Seven bits of mantissa in bfloat16, in products of a few numbers of size one.
            torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05 * float(expected.std()))


@pytest.mark.parametrize('name', NAMES)
def test_device_and_dtype_reach_every_parameter_and_the_seed_decides(name: str) -> None:
    def drawn() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return attention_core_class(name)(6, 5, 3, dtype=torch.bfloat16).state_dict()

    first, second = drawn(), drawn()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize('name', NAMES)
def test_values_are_as_wide_as_keys_by_default(name: str) -> None:
    core = attention_core_class(name)(6)
    assert (core.head_dim, core.value_dim, core.num_heads, core.head_axis) == (6, 6, 1, -3)
    core = attention_core_class(name)(6, 5, 3, -4)
    assert '6, value_dim=5, num_heads=3, head_axis=-4' in repr(core)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('options', 'message'), [
    (dict(head_dim=0), 'head_dim=0'),
    (dict(value_dim=2.5), 'value_dim=2.5'),
    (dict(num_heads=-1), 'num_heads=-1'),
    (dict(num_heads=True), 'num_heads=True'),
    (dict(head_axis=-2), 'head_axis=-2.*-3 for'),
    (dict(head_axis=1), 'head_axis=1.*-3 for'),
])  # fmt: skip
def test_bad_shapes_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attention_core_class(name)(**{'head_dim': 6, **options})


@pytest.mark.parametrize('name', NAMES)
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    core = build(name, num_heads=3)
    q, *rest = inputs(core, 2, 3, queries=TOKENS)
    with pytest.raises(OptionError, match='head_dim=6 and needs'):
        core(q[..., :4], *rest)
    with pytest.raises(OptionError, match='num_heads=3 on axis -3'):
        core(*(x[:, :2] for x in (q, *rest)))
    with pytest.raises(OptionError, match='num_heads=3 on axis -3'):
        core(*(x[0, 0] for x in (q, *rest)))
    if rest:
        for k, v in ((rest[0][..., :4], rest[1]), (rest[0], rest[1][..., :4]), (rest[0], rest[1][..., :4, :])):
            with pytest.raises(OptionError, match='head_dim=6, value_dim=5 and needs'):
                core(q, k, v)


KEYED = [name for name in NAMES if attention_core_class(name).reads_keys]


@pytest.mark.parametrize('name', KEYED)
@pytest.mark.parametrize('num_heads', [1, 3])
@pytest.mark.parametrize(('of_q', 'of_k', 'of_v'), [
    ((2, 3), (2, 1), (2, 1)), ((2, 3), (3,), ()), ((1, 3), (2, 1), (2, 3)), ((3,), (2, 3), (2, 3)),
])  # fmt: skip
def test_leading_axes_broadcast(
    name: str, num_heads: int, of_q: tuple[int, ...], of_k: tuple[int, ...], of_v: tuple[int, ...]
) -> None:
    core = build(name, num_heads=num_heads)
    q, k, v = inputs(core, 2, 3, queries=TOKENS)
    given = [x.flatten(0, 1)[: math.prod(axes)].unflatten(0, axes) if axes else x[0, 0] for x, axes in (
        (q, of_q), (k, of_k), (v, of_v)
    )]  # fmt: skip
    whole = [x.expand(2, 3, -1, -1) for x in given]
    mask = torch.arange(2 * TOKENS).view(2, 1, 1, TOKENS) % 5 > 0
    for attn_mask in (None, mask):
        for out in both_modes(lambda attn_mask=attn_mask: core(*given, attn_mask=attn_mask)):
            close(out, core(*whole, attn_mask=attn_mask).detach())


@pytest.mark.parametrize('name', KEYED)
@pytest.mark.parametrize('num_heads', [1, 3])
@pytest.mark.parametrize(('of_k', 'of_v'), [((4, 3), (4, 3)), ((2, 3), (4, 3)), ((2, 2), (2, 2)), ((5, 2, 2), (2, 3))])
def test_leading_axes_that_do_not_broadcast_are_refused(
    name: str, num_heads: int, of_k: tuple[int, ...], of_v: tuple[int, ...]
) -> None:
    core = build(name, num_heads=num_heads)
    q, k, v = (torch.zeros(*axes, TOKENS, width) for axes, width in (((2, 3), 6), (of_k, 6), (of_v, 5)))
    with pytest.raises(OptionError, match=r'got q of shape \(2, 3, 21, 6\).*do not broadcast'):
        core(q, k, v)


@pytest.mark.parametrize('name', KEYED)
def test_keys_without_an_axis_of_tokens_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r'k of shape \(6,\) and v of shape \(5,\)'):
        build(name)(torch.zeros(2, TOKENS, 6), torch.zeros(6), torch.zeros(5))


def test_unknown_names_are_refused_with_the_closest() -> None:
    assert NAMES == ('external', 'efficient', 'linear', 'halo', 'monarch', 'catt', 'caam')
    with pytest.raises(OptionError, match=r"'externl' is unknown\. Close: external"):
        attention_core_class('externl')
    with pytest.raises(OptionError, match=r'There are: external, efficient, linear, halo, monarch, catt, caam\.'):
        attention_core_class('zzz')
    assert [name for name in NAMES if not attention_core_class(name).reads_keys] == ['external']
