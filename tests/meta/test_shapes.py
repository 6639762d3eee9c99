"""Results found without torch, against those of torch: their shapes, types, strides, and whose memory they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sem_timm.meta import Layout, LayoutMode, set_layout
from sem_timm.meta.vocabulary import WORDS
from sem_timm.surgery.aliasing import share_memory, tensors_in

Make = Callable[..., Tensor]


def made_on(device: str) -> tuple[Make, list[Tensor]]:
    """A function that makes tensors, and all that it has made."""
    made: list[Tensor] = []

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made.append(torch.ones(shape, dtype=dtype, device=device))
        return made[-1]

    return make, made


def a_map(make: Make) -> Tensor:
    return make(2, 6, 8, 10)


def columns(make: Make) -> Tensor:
    """Channels last."""
    return make(2, 6, 8, 10).permute(0, 2, 3, 1)


def tokens(make: Make) -> Tensor:
    return make(2, 5, 12)


def heads(make: Make) -> Tensor:
    return make(2, 3, 5, 4)


# The name of each begins with that of the operation.
CALLS: dict[str, Callable[[Make], Any]] = {
    'add': lambda m: a_map(m) + m(1, 6, 1, 1),
    'add in place': lambda m: a_map(m).add_(m(1, 6, 1, 1)),
    'add by an operator in place': lambda m: a_map(m).__iadd__(1.0),
    'add scaled': lambda m: torch.add(a_map(m), m(10), alpha=2),
    'add of a number in front': lambda m: 1 + columns(m),
    'addcmul': lambda m: torch.addcmul(a_map(m), a_map(m), m(2, 6, 1, 1), value=2.0),
    'sub': lambda m: a_map(m) - 1,
    'subtract': lambda m: torch.subtract(a_map(m), a_map(m)),
    'mul': lambda m: m(6, 1, 1) * a_map(m),
    'mul in place': lambda m: columns(m).mul_(2.0),
    'multiply of parameters alone': lambda m: nn.Parameter(m(4, 1), requires_grad=False).multiply(m(1, 3)),
    'div': lambda m: columns(m) / 3,
    'div of integers': lambda m: m(3, dtype=torch.int64) / 2,
    'div rounded': lambda m: torch.div(tokens(m), 2, rounding_mode='floor'),
    'truediv': lambda m: tokens(m).true_divide(2),
    'divide': lambda m: torch.divide(tokens(m), tokens(m)),
    'clamp': lambda m: columns(m).clamp(min=1e-3),
    'clamp by a tensor': lambda m: a_map(m).clamp(max=m(10)),
    'clamp of integers': lambda m: m(3, dtype=torch.int64).clamp(max=2.5),
    'clip in place': lambda m: a_map(m).clip_(0, 1),
    'cat of tokens': lambda m: torch.cat((m(1, 1, 12).expand(2, -1, -1), tokens(m)), dim=1),
    'cat of permuted maps': lambda m: torch.cat((columns(m), columns(m)), -1),
    'cat of two types': lambda m: torch.cat((tokens(m), tokens(m).double()), 1),
    'cat of two ranks': lambda m: torch.cat((m(0), tokens(m)), 1),
    'concat of one': lambda m: torch.concat((tokens(m),), 1),
    'concatenate': lambda m: torch.concatenate((a_map(m), a_map(m)), dim=1),
    'new_full': lambda m: tokens(m).new_full((3, 1), 2.0),
    'stack': lambda m: torch.stack((tokens(m), tokens(m)), -1),
    'roll': lambda m: torch.roll(columns(m), (-1, 2), (1, 2)),
    'roll by nothing': lambda m: torch.roll(a_map(m), 0, 1),
    'mean': lambda m: a_map(m).mean((2, 3), keepdim=True),
    'mean over an axis of one': lambda m: m(2, 1, 3).mean(1),
    'sum': lambda m: columns(m).sum(-1),
    'sum to another type': lambda m: tokens(m).sum(1, dtype=torch.float64),
    'matmul': lambda m: heads(m) @ heads(m).transpose(-2, -1),
    'matmul with a matrix for all': lambda m: tokens(m) @ m(12, 3),
    'matmul with matrices for some': lambda m: heads(m) @ m(3, 4, 4),
    'matmul with a vector': lambda m: heads(m) @ m(4),
    'softmax': lambda m: heads(m).softmax(-1),
    'softmax to another type': lambda m: heads(m).softmax(-1, dtype=torch.float64),
    'scaled_dot_product_attention': lambda m: F.scaled_dot_product_attention(heads(m), heads(m), heads(m)),
    'linear': lambda m: F.linear(tokens(m), m(7, 12), m(7)),
    'conv1d': lambda m: F.conv1d(tokens(m), m(7, 5, 3), stride=2, padding=1),
    'conv2d of a permuted map': lambda m: F.conv2d(columns(m).permute(0, 3, 1, 2), m(4, 6, 1, 1)),
    'conv2d in groups': lambda m: F.conv2d(a_map(m), m(12, 2, 3, 3), m(12), (2, 1), (1, 0), (1, 2), 3),
    'conv2d with a name for its padding': lambda m: F.conv2d(a_map(m), m(4, 6, 3, 3), padding='same'),
    'lstm': lambda m: lstm(m, 7, num_layers=2, batch_first=True, bidirectional=True)(tokens(m)),
    'lstm with a projection': lambda m: lstm(m, 7, proj_size=3)(tokens(m)),
    'lstm without a batch': lambda m: lstm(m, 7)(tokens(m)[0]),
    'batch_norm': lambda m: F.batch_norm(a_map(m), m(6), m(6), m(6), m(6)),
    'batch_norm of columns': lambda m: F.batch_norm(columns(m).permute(0, 3, 1, 2), m(6), m(6)),
    'batch_norm of weights': lambda m: F.batch_norm(a_map(m).reshape(1, 12, -1), None, None, training=True),
    'group_norm': lambda m: F.group_norm(a_map(m), 2, m(6), m(6)),
    'layer_norm': lambda m: F.layer_norm(tokens(m), (12,), m(12), m(12)),
    'rms_norm': lambda m: F.rms_norm(tokens(m), (12,), m(12)),
    'normalize': lambda m: F.normalize(heads(m), dim=-1),
    'relu': lambda m: F.relu(columns(m)),
    'relu in place': lambda m: nn.ReLU(inplace=True)(a_map(m)),
    'relu by a name in place': lambda m: torch.relu_(a_map(m)),
    'gelu': lambda m: F.gelu(tokens(m), approximate='tanh'),
    'silu': lambda m: F.silu(a_map(m)),
    'silu in place': lambda m: F.silu(a_map(m), True),
    'hardswish in place': lambda m: nn.Hardswish(inplace=True)(a_map(m)),
    'hardsigmoid': lambda m: F.hardsigmoid(a_map(m)),
    'relu6 in place': lambda m: nn.ReLU6(inplace=True)(a_map(m)),
    'sigmoid': lambda m: columns(m).sigmoid(),
    'sigmoid in place': lambda m: columns(m).sigmoid_(),
    'tanh of an expanded tensor': lambda m: m(1, 5, 1).expand(2, 5, 12).tanh(),
}


def lstm(make: Make, width: int, **options: Any) -> nn.Module:
    return nn.LSTM(12, width, device=make(1).device, **options)


def run(name: str, device: str, mode: bool) -> tuple[list[Tensor], list[list[bool]]]:
    """What a call returns, and with which of the tensors made for it each result shares memory."""
    make, made = made_on(device)
    with torch.no_grad(), LayoutMode() if mode else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # some are slow on a CPU
        found = tensors_in(CALLS[name](make))
    return found, [[share_memory(result, given) for given in made] for result in found]


@pytest.mark.parametrize('name', CALLS)
def test_results_are_those_of_torch(name: str) -> None:
    found, _ = run(name, 'meta', True)
    expected, _ = run(name, 'meta', False)
    assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in expected]
    assert all(tensor.is_meta for tensor in found)


@pytest.mark.parametrize('name', CALLS)
def test_results_are_in_the_memory_that_torch_puts_real_ones_in(name: str) -> None:
    _, found = run(name, 'meta', True)
    real, expected = run(name, 'cpu', False)
    assert real and found == expected


def test_every_operation_with_a_shape_of_its_own_is_called_here() -> None:
    called = {name.split()[0] for name in CALLS}
    operators = {'iadd', 'radd', 'isub', 'rsub', 'imul', 'rmul', 'itruediv'}  # other spellings of the first of a word
    found = {name for name, word in WORDS.items() if word.shape is not None}
    assert found - operators == called


@pytest.mark.parametrize(
    'call',
    [
        lambda x, make: torch.cat((x, make(2, 4, 8, 9)), 1),
        lambda x, make: x @ make(3, 3),
        lambda x, make: F.conv2d(x, make(4, 5, 1, 1)),
        lambda x, make: F.rms_norm(x, (12,)),
        lambda x, make: x.add_(make(4, 1, 1, 1, 1)),
        lambda x, make: F.batch_norm(x, make(5), make(5)),
    ],
)
def test_what_does_not_fit_is_an_error_as_in_torch(call: Callable[[Tensor, Make], Tensor]) -> None:
    make, _ = made_on('meta')
    with torch.no_grad(), LayoutMode(), pytest.raises(RuntimeError):
        call(set_layout(a_map(make), Layout(1)), make)
