"""timm's channel attentions in every layout."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from timm.layers import create_attn
from timm.layers.create_attn import get_attn
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.layers import ChannelsFirst, timm_attention, timm_attention_names


class Shift(nn.Module):
    """Moves everything one column to the right; it shows the grid that it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 3)


def keeps_shape(name: str) -> bool:
    """Whether create_attn builds this name for 64 channels, and the module keeps a 16 by 16 input's shape."""
    options = {'use_mlp': False} if name == 'ge' else {}
    x = torch.randn(2, 64, 16, 16)
    try:
        return create_attn(name, 64, **options)(x).shape == x.shape
    except (AssertionError, TypeError):
        return False


def test_names_are_those_of_the_installed_timm_that_keep_the_shape() -> None:
    known = re.findall(r"attn_type == '(\w+)'", inspect.getsource(get_attn))
    assert len(known) >= 17
    assert timm_attention_names() == tuple(name for name in known if keeps_shape(name))


@pytest.mark.parametrize('name', timm_attention_names())
@pytest.mark.parametrize('shape', [(2, 8, 16, 64), (2, 65, 64)])
def test_every_name_runs_with_channels_last(name: str, shape: tuple[int, ...]) -> None:
    prefix = 1 if len(shape) == 3 else 0
    torch.manual_seed(0)
    module = timm_attention(name, 64, channel_dim=-1, num_prefix_tokens=prefix).eval()
    torch.manual_seed(0)
    reference = timm_attention(name, 64).eval()
    x = torch.randn(shape)
    out = module(x)
    grid = x[:, prefix:].unflatten(1, (8, 8)) if prefix else x
    expected = reference(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x[:, prefix:].shape)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(out[:, prefix:], expected)


def test_tokens_are_a_square_grid_or_one_column() -> None:
    square = torch.arange(9.0).view(1, 9, 1)
    assert ChannelsFirst(Shift())(square).flatten().tolist() == [2, 0, 1, 5, 3, 4, 8, 6, 7]
    column = torch.arange(8.0).view(1, 8, 1)
    assert torch.equal(ChannelsFirst(Shift())(column), column)
    assert ChannelsFirst(Shift(), 1)(torch.arange(5.0).view(1, 5, 1)).flatten().tolist() == [0, 2, 1, 4, 3]


def test_channels_first_compiles_whole_and_keeps_gradients() -> None:
    module = ChannelsFirst(create_attn('cbam', 16), num_prefix_tokens=1)
    x = torch.randn(2, 17, 16, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))
    module(x).sum().backward()
    assert x.grad is not None


def test_device_and_dtype_reach_every_module() -> None:
    for name in timm_attention_names():
        module = timm_attention(name, 64, channel_dim=-1, device='meta', dtype=torch.float64)
        assert all(p.device.type == 'meta' and p.dtype == torch.float64 for p in module.parameters()), name


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match=r'Close: .*cbam'):
        timm_attention('cbamm', 64)
    with pytest.raises(OptionError, match='unknown or unfit'):
        timm_attention('bat', 64)
    with pytest.raises(OptionError, match='channel_dim=3'):
        timm_attention('se', 64, channel_dim=3)
    with pytest.raises(OptionError, match='channel_dim=1'):
        timm_attention('se', 64, num_prefix_tokens=1)
    with pytest.raises(OptionError, match='num_prefix_tokens=-1'):
        ChannelsFirst(Shift(), -1)
    for shape in ((2, 1, 4), (2, 3, 3, 4)):
        with pytest.raises(OptionError, match='got an input of shape'):
            ChannelsFirst(Shift(), 1)(torch.randn(shape))
