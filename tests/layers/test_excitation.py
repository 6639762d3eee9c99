"""The excitation operators, their registry, and operators of a user's own."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sem_timm.errors import OptionError
from sem_timm.layers import SEM, Excitation, LinearContextTransform, excitation_names, register_excitation
from sem_timm.layers.excitation import eca_kernel_size
from sem_timm.layers.operators import PUBLISHED_EXCITATIONS, build_operators
from tests.layers.cifar_resnet import cifar_resnet

PUBLISHED = tuple(PUBLISHED_EXCITATIONS)


class OwnExcitation(nn.Module):
    """What a newcomer would write."""

    def __init__(self, channels: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled * self.scale


class OwnZeroableExcitation(OwnExcitation):
    def zero_last_weights(self) -> None:
        nn.init.zeros_(self.scale)


@pytest.mark.parametrize(
    ('channels', 'size'), [(1, 1), (16, 3), (96, 3), (128, 5), (256, 5), (1024, 5), (1536, 5), (2048, 7)]
)
def test_eca_kernel_size_is_the_published_one(channels: int, size: int) -> None:
    assert eca_kernel_size(channels) == size
    assert Excitation(channels, 'eca').operators['eca'].conv.weight.shape == (1, 1, size)


def test_eca_equals_a_one_channel_convolution_and_ceca_wraps_around() -> None:
    pooled = torch.randn(3, 128, dtype=torch.float64)
    eca, ceca = (build_operators((name,), 128, 16, dtype=torch.float64)[name] for name in ('eca', 'ceca'))
    ceca.load_state_dict(eca.state_dict())
    torch.testing.assert_close(eca(pooled), eca.conv(pooled.unsqueeze(1)).squeeze(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ceca(pooled)[:, 2:-2], eca(pooled)[:, 2:-2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ceca(pooled.roll(40, 1)), ceca(pooled).roll(40, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('channels', 'hidden'), [(16, 4), (64, 4), (128, 8), (256, 16)])
def test_squeeze_excitation_hidden_width_is_at_least_four(channels: int, hidden: int) -> None:
    se = SEM(channels).operators['se']
    assert se.fc1.weight.shape == (hidden, channels)
    assert se.fc2.weight.shape == (channels, hidden)
    assert se.fc1.bias is not None and se.fc2.bias is not None


def test_paper_init_of_ie_is_zero_and_minus_one() -> None:
    ie = SEM(8, init='paper').operators['ie']
    assert torch.equal(ie.gamma, torch.zeros(8))
    assert torch.equal(ie.beta, -torch.ones(8))


@settings(max_examples=60, deadline=None)
@given(channels=st.integers(1, 300))
def test_lct_groups_divide_any_number_of_channels(channels: int) -> None:
    groups = LinearContextTransform(channels).num_groups
    assert channels % groups == 0
    assert 1 <= groups <= 16
    assert groups == 1 or channels // groups >= 4


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 70),
    batch=st.integers(0, 3),
    names=st.lists(st.sampled_from(PUBLISHED), min_size=1, max_size=4),
)
def test_identity_holds_for_any_channels_batch_and_operators(channels: int, batch: int, names: list[str]) -> None:
    x = torch.randn(batch, channels, 3, 2)
    assert torch.equal(SEM(channels, operators=names)(x), x)


@pytest.mark.parametrize('name', PUBLISHED)
def test_zero_last_weights_gives_zero_logits_and_a_gradient(name: str) -> None:
    operator = build_operators((name,), 32, 16)[name]
    operator.reset_parameters()
    operator.zero_last_weights()
    zeroed = [parameter for parameter in operator.parameters() if not parameter.any()]
    logits = operator(torch.randn(4, 32))
    assert not logits.any()
    (logits * torch.randn(4, 32)).sum().backward()
    assert zeroed
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in zeroed)


@pytest.mark.parametrize(('depth', 'classes', 'count'), [
    (164, 100, 1_970_104), (164, 10, 1_946_974), (83, 100, 1_014_070), (83, 10, 990_940),
])  # fmt: skip
def test_cifar_resnets_with_sem_have_the_published_number_of_parameters(depth: int, classes: int, count: int) -> None:
    with torch.device('meta'):
        model = cifar_resnet(depth, classes, functools.partial(SEM, reduction=16, init='paper'))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(('operator', 'count'), [(None, 1_727_284), ('se', 1_929_388), ('ie', 1_743_412)])
def test_single_systems_have_the_published_number_of_parameters(operator: str | None, count: int) -> None:
    attention = functools.partial(Excitation, excitation=operator, init='paper') if operator else None
    with torch.device('meta'):
        model = cifar_resnet(164, 100, attention)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_cifar_resnet_with_sem_runs_and_learns() -> None:
    model = cifar_resnet(11, 10, SEM)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_own_class_takes_part_by_class_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sem_timm.layers.operators._excitations', dict(PUBLISHED_EXCITATIONS))
    x = torch.randn(2, 8, 4, 4)
    by_class = SEM(8, operators=('se', OwnZeroableExcitation))
    assert 'operators.OwnZeroableExcitation.scale' in by_class.state_dict()
    assert torch.equal(by_class(x), x)
    register_excitation('own_zeroable', OwnZeroableExcitation)
    register_excitation('own_zeroable', OwnZeroableExcitation)
    assert 'own_zeroable' in excitation_names()
    by_name = SEM(8, operators=('own_zeroable', OwnZeroableExcitation))
    assert {'operators.own_zeroable.scale', 'operators.own_zeroable_2.scale'} <= set(by_name.state_dict())


def test_own_class_without_zero_last_weights_works_with_paper_init_only() -> None:
    assert SEM(8, operators=(OwnExcitation,), init='paper')(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)
    with pytest.raises(OptionError, match=r"(?s)OwnExcitation.*zero_last_weights\(self\).*init='paper'"):
        SEM(8, operators=(OwnExcitation,))


@pytest.mark.parametrize('name', ['se', 'not a name', 'a.b', 'keys', '', 3, 'sem', 'external', 'external2d', 'timm_gc'])
def test_registering_refuses_taken_and_unusable_names(name: str) -> None:
    before = excitation_names()
    with pytest.raises(OptionError, match='name='):
        register_excitation(name, OwnExcitation)
    assert excitation_names() == before


@pytest.mark.parametrize('operator', [nn.ReLU, 7, lambda channels: nn.Identity(), OwnExcitation(4)])
def test_unusable_operators_are_refused(operator: object) -> None:
    with pytest.raises(OptionError, match='operator'):
        SEM(8, operators=(operator,))  # type: ignore[arg-type]
