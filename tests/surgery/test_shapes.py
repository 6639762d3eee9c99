"""Shapes found directly, against those that torch finds on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sem_timm.meta.layout import Layout, LayoutMode, set_layout


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device='meta')


MAP = meta(2, 6, 8, 10)
TOKENS = meta(2, 5, 12)
COLUMNS = MAP.permute(0, 2, 3, 1)
HEADS = meta(2, 3, 5, 4)

CALLS: dict[str, Callable[[], Any]] = {
    'conv1d': lambda: F.conv1d(TOKENS, meta(7, 5, 3), stride=2, padding=1),
    'conv2d of a permuted map': lambda: F.conv2d(COLUMNS.permute(0, 3, 1, 2), meta(4, 6, 1, 1)),
    'conv2d in groups': lambda: F.conv2d(MAP, meta(12, 2, 3, 3), meta(12), (2, 1), (1, 0), (1, 2), 3),
    'conv2d with a name for its padding': lambda: F.conv2d(MAP, meta(4, 6, 3, 3), padding='same'),
    'batch norm of weights': lambda: F.batch_norm(MAP.reshape(1, 12, -1), None, None, training=True),
    'layer norm': lambda: F.layer_norm(TOKENS, (12,), meta(12), meta(12)),
    'rms norm': lambda: F.rms_norm(TOKENS, (12,), meta(12)),
    'normalize': lambda: F.normalize(HEADS, dim=-1),
    'softmax to another type': lambda: HEADS.softmax(-1, dtype=torch.float64),
    'relu6': lambda: nn.ReLU6(inplace=True)(MAP),
    'hard tanh': lambda: F.hardtanh(COLUMNS, -2.0, 2.0),
    'leaky relu': lambda: F.leaky_relu(COLUMNS, 0.2),
    'clamp': lambda: COLUMNS.clamp(min=1e-3),
    'clamp by a tensor': lambda: MAP.clamp(max=meta(10)),
    'clamp of integers': lambda: meta(3, dtype=torch.int64).clamp(max=2.5),
    'power': lambda: COLUMNS**2,
    'power of a number': lambda: 2.0**TOKENS,
    'power of integers': lambda: meta(3, dtype=torch.int64) ** 0.5,
    'negative': lambda: -COLUMNS,
    'negative integers': lambda: -meta(3, dtype=torch.int64),
    'exponential of integers': lambda: meta(3, dtype=torch.int64).exp(),
    'roll': lambda: torch.roll(COLUMNS, (-1, 2), (1, 2)),
    'cat of tokens': lambda: torch.cat((meta(1, 1, 12).expand(2, -1, -1), TOKENS), dim=1),
    'cat of permuted maps': lambda: torch.cat((COLUMNS, COLUMNS), -1),
    'cat of two types': lambda: torch.cat((TOKENS, TOKENS.double()), 1),
    'cat of two ranks': lambda: torch.cat((meta(0), TOKENS), 1),
    'matrices': lambda: HEADS @ HEADS.transpose(-2, -1),
    'a matrix for all': lambda: TOKENS @ meta(12, 3),
    'matrices for some': lambda: HEADS @ meta(3, 4, 4),
    'matrix and vector': lambda: HEADS @ meta(4),
    'addcmul': lambda: torch.addcmul(MAP, MAP, meta(2, 6, 1, 1), value=2.0),
    'division': lambda: COLUMNS / 3,
    'division of integers': lambda: meta(3, dtype=torch.int64) / 2,
    'rounded division': lambda: torch.div(TOKENS, 2, rounding_mode='floor'),
    'pooled map': lambda: F.adaptive_avg_pool2d(MAP, (None, 4)),
    'pooled to one': lambda: nn.AdaptiveAvgPool2d(1)(MAP),
    'pooled without a batch': lambda: F.adaptive_avg_pool2d(MAP[0], 2),
    'lstm': lambda: nn.LSTM(12, 7, num_layers=2, batch_first=True, bidirectional=True, device='meta')(TOKENS),
    'lstm with a projection': lambda: nn.LSTM(12, 7, proj_size=3, device='meta')(TOKENS),
    'lstm without a batch': lambda: nn.LSTM(12, 7, device='meta')(TOKENS[0]),
    'scaled sum': lambda: torch.add(MAP, meta(10), alpha=2),
    'parameters alone': lambda: nn.Parameter(meta(4, 1), requires_grad=False) * meta(1, 3),
}


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for entry in value for leaf in leaves(entry)]


@pytest.mark.parametrize('name', CALLS)
def test_shapes_types_and_places_in_memory_are_those_of_torch(name: str) -> None:
    with torch.no_grad():
        expected = leaves(CALLS[name]())
        with LayoutMode():
            found = leaves(CALLS[name]())
    assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in expected]
    assert all(tensor.is_meta for tensor in found)


@pytest.mark.parametrize(
    'call',
    [
        lambda x: torch.cat((x, meta(2, 4, 8, 9)), 1),
        lambda x: x @ meta(3, 3),
        lambda x: F.conv2d(x, meta(4, 5, 1, 1)),
        lambda x: F.rms_norm(x, (12,)),
    ],
)
def test_what_does_not_fit_is_an_error_as_in_torch(call: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad(), LayoutMode(), pytest.raises(RuntimeError):
        call(set_layout(meta(2, 6, 8, 10), Layout(1)))
