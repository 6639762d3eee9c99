"""What a graph cannot show is not rewritten: such a block is treated as a whole, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm


class Doubles(nn.Module):
    """An inserted module that shows how often it acts."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def network(forward: Callable[..., Tensor]) -> nn.Sequential:
    block = type('Block', (nn.Module,), {'forward': forward})()
    block.conv = nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 8, 1), block)


def switches_autocast_off(self: Any, x: Tensor) -> Tensor:
    with torch.autocast('cpu', enabled=False):
        y = self.conv(x)
    return x + y


def stops_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.mean()
    return x + self.conv(x) * scale


def drops_itself_at_random(self: Any, x: Tensor) -> Tensor:
    if self.training and torch.rand(1, device='cpu').item() < 0.5:
        return x
    return x + self.conv(x)


def adds_in_a_statement(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.add_(x)
    return y


def drops_itself_by_numpy(self: Any, x: Tensor) -> Tensor:
    if self.training and numpy.random.rand() < 0.5:
        return x
    return x + self.conv(x)


def asks_whether_gradients_are_wanted(self: Any, x: Tensor) -> Tensor:
    return x + (self.conv(x) if x.requires_grad else 2 * self.conv(x))


def asks_whether_it_is_frozen(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return x + (y if any(p.requires_grad for p in self.parameters()) else y.detach())


def asks_for_a_graph(self: Any, x: Tensor) -> Tensor:
    return x + (self.conv(x) if x.grad_fn is None else 2 * self.conv(x))


def asks_whether_it_is_a_tensor(self: Any, x: Tensor) -> Tensor:
    if torch.is_tensor(x):  # laid out like this, the convolution adds up in another order
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    return x + self.conv(x)


@torch.no_grad()
def is_decorated(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x)


FORWARDS = [switches_autocast_off, stops_gradients, drops_itself_at_random, adds_in_a_statement, is_decorated]
FORWARDS += [drops_itself_by_numpy, asks_whether_gradients_are_wanted, asks_whether_it_is_frozen, asks_for_a_graph]


@pytest.mark.parametrize('forward', FORWARDS)
def test_such_a_block_is_gated_as_a_whole(forward: Callable[..., Tensor]) -> None:
    model = network(forward)
    with pytest.raises(sem_timm.RefusedError):
        sem_timm.plan_model(model, target='1', position='residual', input_size=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    expected = model(x)
    (site,) = sem_timm.plan_model(model, Doubles, target='1', input_size=(3, 8, 8))
    assert site.position == 'output'
    assert torch.equal(2 * expected, sem_timm.patch_model(model, Doubles, target='1', input_size=(3, 8, 8))(x))


def asks_for_an_attribute(self: Any, x: Tensor) -> Tensor:
    if hasattr(x, 'decomposed'):  # as far as a trace can tell, it has any attribute
        self.norm(x)
    return x + self.conv(x)


def test_calls_whose_results_are_not_used_count() -> None:
    model = network(asks_for_an_attribute)
    model[1].norm = nn.BatchNorm2d(8)
    with pytest.raises(sem_timm.RefusedError, match='rewritten, it computes something else'):
        sem_timm.plan_model(model, target='1', position='residual', input_size=(3, 8, 8))


def draws_if_it_is_a_tensor(self: Any, x: Tensor) -> Tensor:
    if torch.is_tensor(x) and self.training:
        random.random()
    return x + self.conv(x)


def test_numbers_that_are_drawn_and_not_used_count() -> None:
    with pytest.raises(sem_timm.RefusedError, match='rewritten, it computes something else'):
        sem_timm.plan_model(network(draws_if_it_is_a_tensor), target='1', position='residual', input_size=(3, 8, 8))


def test_another_place_in_memory_is_another_input() -> None:
    with pytest.raises(sem_timm.RefusedError, match='rewritten, it computes something else'):
        sem_timm.plan_model(network(asks_whether_it_is_a_tensor), target='1', input_size=(3, 8, 8))


def test_a_sequence_does_not_get_a_new_step() -> None:
    for architecture, target in (('rdnet_tiny', None), ('test_resnet', 'layer1')):
        model = timm.create_model(architecture, num_classes=10).eval()
        lengths = [len(module) for module in model.modules() if isinstance(module, nn.Sequential)]
        calls: list[Tensor] = []
        sem_timm.patch_model(model, Doubles, target=target, position='output', input_size=(3, 64, 64))
        for module in [module for module in model.modules() if isinstance(module, Doubles)]:
            module.register_forward_hook(lambda _, args, out, calls=calls: calls.append(out))
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        assert len(calls) == len(sem_timm.patched_modules(model))
        assert lengths == [len(module) for module in model.modules() if isinstance(module, nn.Sequential)]


class Feedforward(nn.Module):
    """A residual block of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class TokensFirst(nn.Module):
    """A transformer whose batch is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.layer = Feedforward()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.stem(x).flatten(2).permute(2, 0, 1))
        return out


def test_a_batch_that_is_not_the_first_axis_is_refused() -> None:
    with pytest.raises(sem_timm.RefusedError, match='the batch is not the first axis'):
        sem_timm.plan_model(TokensFirst(), target='layer', input_size=(3, 32, 32))


SEEN: list[int] = []


def counts_in_a_child(self: Any, x: Tensor) -> Tensor:
    self.conv.count += 1
    return x + self.conv(x)


def counts_in_an_object(self: Any, x: Tensor) -> Tensor:
    self.counts.number += 1
    return x + self.conv(x)


def counts_in_a_dictionary(self: Any, x: Tensor) -> Tensor:
    self.seen['all'].append(1)
    return x + self.conv(x)


def counts_in_a_global_list(self: Any, x: Tensor) -> Tensor:
    SEEN.append(1)
    return x + self.conv(x)


@pytest.mark.parametrize(
    ('forward', 'changed'),
    [
        (counts_in_a_child, 'self.conv.count'),
        (counts_in_an_object, 'self.counts'),
        (counts_in_a_dictionary, 'self.seen'),
        (counts_in_a_global_list, 'what is outside of its module'),
    ],
)
def test_what_a_forward_changes_on_the_way_is_told(forward: Callable[..., Tensor], changed: str) -> None:
    model: Any = network(forward)
    model[1].conv.count, model[1].counts, model[1].seen = 0, SimpleNamespace(number=0), {'all': []}
    with pytest.raises(sem_timm.RefusedError, match=f'it changes {changed}, which a graph cannot show'):
        sem_timm.plan_model(model, position='residual', input_size=(3, 8, 8))
