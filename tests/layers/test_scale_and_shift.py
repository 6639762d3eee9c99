"""A scale and a shift per channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sem_timm import OptionError, ScaleAndShift


@pytest.mark.parametrize('channel_dim', [1, -1])
def test_it_scales_and_shifts_each_channel(channel_dim: int) -> None:
    layer = ScaleAndShift(3, channel_dim)
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([1.0, -2.0, 0.5]))
        layer.shift.copy_(torch.tensor([0.0, 3.0, -1.0]))
    x = torch.randn(2, 3, 4, 5)
    expected = torch.stack((x[:, 0], 3 - 2 * x[:, 1], x[:, 2] / 2 - 1), 1)
    given = x if channel_dim == 1 else x.movedim(1, -1)
    out = layer(given)
    assert torch.equal(out if channel_dim == 1 else out.movedim(-1, 1), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_it_starts_as_an_identity_down_to_the_sign_of_zero_and_learns_at_once(dtype: torch.dtype) -> None:
    layer = ScaleAndShift(4, dtype=dtype)
    x = torch.tensor([0.0, -0.0, 1e-3, -float('inf')]).to(dtype).view(1, 4, 1, 1)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(layer(x).view(bits), x.view(bits))
    layer(torch.ones(2, 4, 3, 3, dtype=dtype)).sum().backward()
    for parameter in layer.parameters():
        assert isinstance(parameter.grad, Tensor) and bool((parameter.grad != 0).all())


def test_autocast_keeps_the_type_of_the_input() -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(ScaleAndShift(4)(x), x)


def test_it_stands_for_weights_of_a_base_only_until_it_is_trained() -> None:
    layer = ScaleAndShift(4)
    assert layer.state_beside_base() is not None
    with torch.no_grad():
        layer.shift[1] = 0.5
    assert layer.state_beside_base() is None
    layer.reset_parameters()
    assert layer.state_beside_base() is not None


@pytest.mark.parametrize('options', [{'channels': 0}, {'channels': 4, 'channel_dim': 2}])
def test_arguments_out_of_range_are_an_error(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match='channel'):
        ScaleAndShift(**options)
