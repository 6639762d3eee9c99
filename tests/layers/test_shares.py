"""The attention that external memories show is the one they compute with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers import ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention


@pytest.mark.parametrize('norm', ['double', 'softmax'])
@pytest.mark.parametrize(('heads', 'axis'), [(1, -3), (3, -3), (3, -4)])
@pytest.mark.parametrize('masked', [False, True])
def test_core_mixes_its_values_by_the_shares_it_shows(norm: str, heads: int, axis: int, masked: bool) -> None:
    core = ExternalAttention(8, 6, num_heads=heads, head_axis=axis, memory=5, norm=norm)  # type: ignore[arg-type]
    shape = (2, 3, 7, 8) if axis == -3 else (2, 3, 4, 7, 8)
    q = torch.randn(*shape)
    mask = torch.rand(2, *(1,) * (len(shape) - 2), 7) > 0.3 if masked else None
    shares = core.attention(q, mask)
    assert shares.shape == (*shape[:-1], 5)
    values = core.mv if heads == 1 else core.mv.reshape(3, *(1,) * (-axis - 3), 5, 6)
    torch.testing.assert_close(shares @ values, core(q, mask))
    real = shares if mask is None else shares[mask.expand((*shape[:-2], 1, 7)).squeeze(-2)]
    torch.testing.assert_close(real.sum(-1), torch.ones(real.shape[:-1]))


@pytest.mark.parametrize('tokens', [7, 200])  # the second is computed by products of weights
def test_multi_head_layer_mixes_its_values_by_the_shares_it_shows(tokens: int) -> None:
    layer = MultiHeadExternalAttention(16, num_heads=2, memory=5).eval()
    x = torch.randn(2, tokens, 16)
    shares = layer.attention(x)
    assert shares.shape == (2, tokens, 8, 5)
    torch.testing.assert_close(layer.proj(layer.mv(shares).flatten(-2)), layer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match='causal'):
        layer.attention(x, is_causal=True)


def test_block_of_feature_maps_mixes_its_values_by_the_shares_it_shows() -> None:
    block = ExternalAttention2d(6, memory=5, init='paper').eval()
    x = torch.randn(2, 6, 3, 4)
    shares: Tensor = block.attention(x)
    assert shares.shape == (2, 5, 3, 4)
    mixed = torch.einsum('bshw,sc->bchw', shares, block.mv)
    torch.testing.assert_close(torch.relu(x + block.norm(block.conv2(mixed))), block(x))
    with pytest.raises(OptionError, match='needs'):
        block.attention(x[0])
