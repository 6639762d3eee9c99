"""Equivalents of forwards and functions against the originals, in numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer

import sem_timm
from sem_timm.surgery.equivalents import equivalent_of, forward_of
from tests.lively import lively
from tests.surgery.test_lost_in_a_trace import Doubles
from tests.twins import trained

BATCH, TOKENS, OTHERS, WIDTH = 2, 5, 7, 16


def attention(**options: Any) -> nn.MultiheadAttention:
    return lively(nn.MultiheadAttention(WIDTH, 4, dropout=0.1, **{'batch_first': True, **options})).eval()


def tokens(count: int, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, count, width)


SELF = tokens(TOKENS)
ATTENTION: dict[str, tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    'of tokens to themselves': ({}, (SELF, SELF, SELF), {}),
    'without biases': ({'bias': False}, (SELF, SELF, SELF), {}),
    'tokens first': ({'batch_first': False}, (SELF.transpose(0, 1),) * 3, {}),
    'to others': ({}, (tokens(TOKENS), tokens(OTHERS), tokens(OTHERS)), {}),
    'tokens first, to others': (
        {'batch_first': False},
        (tokens(TOKENS).transpose(0, 1), *(tokens(OTHERS).transpose(0, 1),) * 2),
        {},
    ),
    'of other widths': ({'kdim': 6, 'vdim': 10}, (tokens(TOKENS), tokens(OTHERS, 6), tokens(OTHERS, 10)), {}),
    'with a mask of pairs': ({}, (SELF, SELF, SELF), {'attn_mask': torch.ones(TOKENS, TOKENS).triu(1).bool()}),
    'with a mask of pairs for each head': (
        {},
        (SELF, SELF, SELF),
        {'attn_mask': torch.randn(BATCH * 4, TOKENS, TOKENS)},
    ),
    'with padding': (
        {},
        (SELF, SELF, SELF),
        {'key_padding_mask': torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    ),
    'causal': (
        {},
        (SELF, SELF, SELF),
        {'attn_mask': torch.ones(TOKENS, TOKENS).triu(1).bool(), 'is_causal': True},
    ),
}


@pytest.mark.parametrize('name', ATTENTION)
def test_multi_head_attention_is_torchs(name: str) -> None:
    options, inputs, masks = ATTENTION[name]
    module = attention(**options)
    spelled_out: Any = forward_of(nn.MultiheadAttention)
    assert spelled_out is not nn.MultiheadAttention.forward
    with torch.no_grad():
        expected, _ = module(*inputs, need_weights=False, **masks)
        found, weights = spelled_out(module, *inputs, need_weights=False, **masks)
    assert weights is None
    torch.testing.assert_close(found, expected)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return lively(nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, **options)).eval()


@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize('masks', [{}, {'src_mask': torch.ones(TOKENS, TOKENS).triu(1).bool()}])
def test_encoder_layers_are_torchs(norm_first: bool, masks: dict[str, Tensor]) -> None:
    layer = encoder_layer(norm_first=norm_first)
    spelled_out: Any = forward_of(nn.TransformerEncoderLayer)
    assert torch.equal(spelled_out(layer, SELF, **masks), layer(SELF, **masks))  # with gradients: no shortcut


@pytest.mark.parametrize('norm_first', [False, True])
def test_encoder_layers_take_modules_and_undo(norm_first: bool) -> None:
    model = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=False).eval()
    base = model(SELF)
    sem_timm.patch_model(model, input_size=(TOKENS, WIDTH))
    assert torch.equal(base, model(SELF))
    trained(model)
    with torch.no_grad():  # where torch's own layer would compute all in one call
        assert not torch.allclose(base, model(SELF), atol=1e-2)
    sem_timm.unpatch_model(model)
    assert torch.equal(base, model(SELF))


def test_nothing_is_put_where_an_encoder_layer_would_not_call_it() -> None:
    model = nn.Sequential(encoder_layer()).eval()
    for target in ('0.linear2', '0.self_attn'):
        with pytest.raises(sem_timm.RefusedError, match='TransformerEncoderLayer, computes it without calling it'):
            sem_timm.plan_model(model, target=target, input_size=(TOKENS, WIDTH))


EQUATIONS = {
    'bhid,bhjd->bhij': ((2, 3, 4, 5), (2, 3, 6, 5)),
    'bhij, bhjd -> bhid': ((2, 3, 4, 6), (2, 3, 6, 5)),
    'b i h d, b j h d -> b h i j': ((2, 4, 3, 5), (2, 6, 3, 5)),
    'bhij,bjhd->bihd': ((2, 3, 4, 6), (2, 6, 3, 5)),
    'bhdi,bhdj->bhij': ((2, 3, 5, 4), (2, 3, 5, 6)),
    '...id,...jd->...ij': ((2, 3, 4, 5), (2, 3, 6, 5)),
    'id,jd->ij': ((4, 5), (6, 5)),
}


@pytest.mark.parametrize('equation', EQUATIONS)
def test_einsum_is_torchs(equation: str) -> None:
    operands = [torch.randn(shape) for shape in EQUATIONS[equation]]
    spelled_out: Any = equivalent_of(torch.einsum)
    found = spelled_out(equation, *operands)
    assert found is not NotImplemented
    torch.testing.assert_close(found, torch.einsum(equation, *operands))


@pytest.mark.parametrize(
    'equation', ['ij,jk', 'bij->bi', 'bii,bij->bij', 'bijk,bjkl->bil', 'bi,bi->b', 'i...d,j...d->ij...']
)
def test_other_equations_are_left_as_they_are(equation: str) -> None:
    spelled_out: Any = equivalent_of(torch.einsum)
    assert spelled_out(equation, *[torch.ones(2, 2, 2)] * (equation.count(',') + 1)) is NotImplemented


WINDOWS = {'window_size': [4, 4], 'num_heads': 2, 'attention_dropout': 0.0, 'dropout': 0.0, 'training': False}


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('shift', [(0, 0), (2, 2), (0, 2), (1, 3)])
@pytest.mark.parametrize('size', [(8, 8), (4, 4), (3, 5), (9, 7), (4, 12)])
def test_attention_in_shifted_windows_is_torchvisions(
    size: tuple[int, int], shift: tuple[int, int], cosine: bool
) -> None:
    original = swin_transformer.shifted_window_attention
    spelled_out: Any = equivalent_of(original)
    weights = torch.randn(48, WIDTH) / 4, torch.randn(WIDTH, WIDTH) / 4
    options: dict[str, Any] = {
        'relative_position_bias': torch.randn(1, 2, 16, 16),
        'shift_size': list(shift),
        **WINDOWS,
    }
    options |= {'qkv_bias': torch.randn(48), 'logit_scale': torch.rand(2, 1, 1) if cosine else None}
    x = torch.randn(BATCH, *size, WIDTH)
    torch.testing.assert_close(spelled_out(x, *weights, **options), original(x, *weights, **options))


def test_what_is_not_known_is_read_as_it_is() -> None:
    assert equivalent_of(F.relu) is None and forward_of(nn.Linear) is nn.Linear.forward


# Classes that wrap the forward of whatever derives from them


class Wrapping(nn.Module):
    """Notes its calls, as a library's layers may start checkpointing."""

    calls = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            Wrapping.calls += type(self).forward is wrapped  # once a call, however often it was derived from
            return forward(self, *args, **kwargs)

        cls.forward = wrapped  # type: ignore[method-assign]


class Block(Wrapping):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.conv(x) * scale


class Derived(Block):
    pass


@pytest.mark.parametrize('cls', [Block, Derived])
def test_forwards_that_every_derived_class_wraps_are_read_inside_and_stay_wrapped(cls: type[Block]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), cls())
    x = torch.randn(2, 3, 8, 8)
    base = model(x)
    sem_timm.patch_model(model, Doubles, input_size=(3, 8, 8))
    (site,) = sem_timm.patched_modules(model)
    Wrapping.calls = 0
    assert site.position == 'residual' and not torch.equal(model(x), base) and Wrapping.calls == 1
    sem_timm.unpatch_model(model)
    assert torch.equal(model(x), base)


def noisy(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any) -> Any:
        return 2 * forward(self, *args)

    return wrapped


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    @noisy
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_other_decorators_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Decorated())
    with pytest.raises(sem_timm.RefusedError, match='is decorated, which a graph cannot show'):
        sem_timm.plan_model(model, target='1', position='residual', input_size=(3, 8, 8))
