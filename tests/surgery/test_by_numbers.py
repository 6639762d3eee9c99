"""Forwards that make tensors, count, or decide by numbers: read, or refused by themselves and for their own reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import sem_timm
from tests.lively import lively

SIZE = (3, 8, 8)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer('count', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def network(forward: Callable[..., Tensor]) -> nn.Sequential:
    """A block with some forward between two plain ones."""
    odd = type('Odd', (Block,), {'forward': forward})()
    return lively(nn.Sequential(nn.Conv2d(3, 8, 1), Block(), odd, Block())).eval()


def makes_a_vector(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * torch.tensor([0.5])


def makes_a_number(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * torch.tensor(0.5)


def makes_a_ramp(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * torch.arange(8)[:, None, None]


def makes_a_grid(self: Any, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return x + self.conv(x) * torch.ones(height, width).tril()


def takes_the_lowest_number(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x).clamp(min=torch.finfo(x.dtype).min)


def multiplies_by_a_mean(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * x.mean().item()


@pytest.mark.parametrize(
    'forward',
    [makes_a_vector, makes_a_number, makes_a_ramp, makes_a_grid, takes_the_lowest_number, multiplies_by_a_mean],
)
def test_what_is_made_of_sizes_and_numbers_is_read(forward: Callable[..., Tensor]) -> None:
    model = network(forward)
    images = [torch.randn(2, *SIZE), torch.randn(1, 3, 6, 10)]
    expected = [model(x) for x in images]
    plan = sem_timm.plan_model(model, 'sem', input_size=SIZE)
    assert [(site.name, site.position) for site in plan] == [(name, 'residual') for name in '123']
    sem_timm.patch_model(model, plan)
    assert all(torch.equal(model(x), old) for x, old in zip(images, expected, strict=True))


def counts(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return x + self.conv(x)


def counts_in_training(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.count += 1
    return x + self.conv(x)


def counts_anew(self: Any, x: Tensor) -> Tensor:
    self.count = self.count + 1
    return x + self.conv(x)


def decides(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = x * 2
    return x + self.conv(x)


def insists(self: Any, x: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    return x + self.conv(x)


def goes_by_numpy(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * torch.from_numpy(numpy.ones(1, dtype='float32'))


@pytest.mark.parametrize(
    ('forward', 'reason'),
    [
        (counts, 'the forward changes self.count'),
        (counts_in_training, 'the forward changes self.count'),
        (counts_anew, 'forward changes self.count'),
        (decides, 'the forward depends on values of a tensor'),
        (insists, 'the forward depends on values of a tensor'),
        (goes_by_numpy, 'the forward makes a constant tensor'),
    ],
)
def test_what_cannot_be_read_is_refused_by_itself(forward: Callable[..., Tensor], reason: str) -> None:
    model = network(forward)
    for _ in range(2):  # nothing of a plan is left for the next one
        plan = sem_timm.plan_model(model, 'sem', input_size=SIZE)
        assert [site.name for site in plan] == ['1', '3']
        (refusal,) = plan.refusals
        assert refusal.name == '2' and reason in refusal.reason
        assert forward not in (decides, insists) or 'test_by_numbers.py:' in refusal.reason


def test_a_long_text_of_torch_is_shortened() -> None:
    model = network(lambda self, x: x + self.conv(x) * x[x > 0].mean())
    with pytest.raises(sem_timm.OptionError) as caught:
        sem_timm.plan_model(model, 'sem', input_size=SIZE)
    assert 'test_by_numbers.py:' in str(caught.value) and len(str(caught.value)) < 500


def test_gates_of_windows_are_told() -> None:
    class Windows(nn.Module):
        """Halves of an image, side by side in the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            halves = self.inner(torch.cat(x.chunk(2, dim=2)))
            return torch.cat(halves.chunk(2), dim=2)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), Windows())
    plan = sem_timm.plan_model(model, 'sem', input_size=SIZE)
    assert {site.name: site.num_windows for site in plan} == {'1': 1, '2.inner': 2}
    assert 'Pooled window by window, since the batch holds windows and not images: 2.inner.' in repr(plan)
    assert plan.to_dict()['sites'][1]['num_windows'] == 2
    assert 'Pooled window' not in repr(sem_timm.plan_model(model, 'sem', input_size=SIZE, target='1'))
