"""Where a constant factor per channel goes, in blocks that end in one operation each; and that it does, in numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, LayerNorm2d, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from sem_timm.surgery import FactorPlace, factor_places
from tests.lively import lively
from tests.versions import TORCH

WIDTH, SIZE = 6, (3, 8, 8)


class Block(nn.Module):
    """A convolution on the branch, and what each test puts behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(x, self.conv(x))


class Plain(Block):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale[:, None, None]


class ScaledAsAWhole(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale / 3 * 0.5


class Biased(Scaled):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(y + self.scale.view(1, -1, 1, 1))


class TwoConvolutions(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.other(x * x)


class SummedInALoop(TwoConvolutions):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        total: Any = 0
        for part in (y, self.other(x * x)):
            total = total + part
        return total  # type: ignore[no-any-return]


class Joined(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(WIDTH, 2, 3, padding=1), nn.Conv2d(WIDTH, 4, 1)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y, self.other(x * x)], 1)


class Tokens(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = self.linear(y.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape).contiguous()


class NormedTokens(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.RMSNorm(WIDTH)  # type: ignore[assignment]


class MixedTokens(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64, bias=False)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mix(y.flatten(2)).unflatten(2, (8, 8))


class Layered(Block):
    """Layers that are walked into, called as children."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)  # type: ignore[no-any-return]


class ReadTwice(Block):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y * y.mean((2, 3), keepdim=True)


class ReadElsewhere(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.conv(x)
        return x + y, y


class FlippedChannels(Block):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y.roll(1, dims=1)


class BiasedAtTheEnd(Scaled):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale.view(1, -1, 1, 1)


class ScaledBias(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.scale * self.gain).view(1, -1, 1, 1) + y


class BiasOfALayer(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(1, WIDTH))

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(self.prompt)[:, :, None, None] + y


class Subtracted(TwoConvolutions):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return self.other(x * x) - y


class SubtractedFrom(TwoConvolutions):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.rsub(y, self.other(x * x))


class JoinedRows(TwoConvolutions):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :, :4], self.other(x * x)[:, :, 4:]], 2)


class BesideJoined(Joined):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(WIDTH, WIDTH, 1)

    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return super().tail(x, y) + self.whole(x)


class BesideJoinedWithoutBias(BesideJoined):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(WIDTH, 4, 1, bias=False)


class Numbered(Block):
    def tail(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 1.0


def network(block: nn.Module, operation: str = 'ie', **options: Any) -> Any:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, WIDTH, 1), block
            self.head = nn.Conv2d(WIDTH, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.block(self.stem(x))
            return self.head(x[0] + x[1] if isinstance(x, tuple) else x).mean((2, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lively(Network()).eval()
        sem_timm.patch_model(model, operation, target=['block'], input_size=SIZE, **options)
    for parameter in getattr(model.block, operation).parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


# The parameters of the block that take a factor, those of them that take a shift beside it, and what they are part of.
PLACES = pytest.mark.parametrize(
    ('block', 'parameters', 'biases', 'kind'),
    [
        (Plain(), 'conv.weight conv.bias', 'conv.bias', 'convolution'),
        (Scaled(), 'scale', '', 'layer scale'),
        (ScaledAsAWhole(), 'conv.weight conv.bias', '', 'convolution'),
        (Biased(), 'conv.weight conv.bias scale', '', 'convolution + bias'),
        (BiasedAtTheEnd(), 'conv.weight conv.bias scale', 'conv.bias', 'convolution + bias'),
        (TwoConvolutions(), 'conv.weight conv.bias other.weight', 'conv.bias', 'convolution'),
        (SummedInALoop(), 'conv.weight conv.bias other.weight', 'conv.bias', 'convolution'),
        (Joined(), 'conv.weight conv.bias other.weight other.bias', 'conv.bias other.bias', 'convolution'),
        (ScaledBias(), 'scale conv.weight conv.bias', 'conv.bias', 'bias + convolution'),
        (
            BiasOfALayer(),
            *('linear.weight linear.bias conv.weight conv.bias', 'linear.bias', 'bias + convolution'),
        ),
        (Subtracted(), 'other.weight conv.weight conv.bias', '', 'convolution'),
        (SubtractedFrom(), 'conv.weight conv.bias other.weight', '', 'convolution'),
        (JoinedRows(), 'conv.weight conv.bias other.weight', '', 'convolution'),
        (
            BesideJoined(),
            *('conv.weight conv.bias other.weight other.bias whole.weight whole.bias', 'whole.bias', 'convolution'),
        ),
        (
            BesideJoinedWithoutBias(),
            *('conv.weight conv.bias other.weight whole.weight whole.bias', 'whole.bias', 'convolution'),
        ),
        (Tokens(), 'linear.weight linear.bias', 'linear.bias', 'linear layer'),
        (MixedTokens(), 'conv.weight conv.bias', '', 'convolution'),
        (
            Layered(nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.Dropout2d(0.1)),
            *('layers.0.weight layers.0.bias', '', 'batch norm'),
        ),
        (
            Layered(nn.GroupNorm(2, WIDTH), DropPath(0.2)),
            *('layers.0.weight layers.0.bias', 'layers.0.bias', 'group norm'),
        ),
        (
            Layered(LayerNorm2d(WIDTH), nn.Identity()),
            *('layers.0.weight layers.0.bias', 'layers.0.bias', 'layer norm'),
        ),
        (NormedTokens(), 'linear.weight', '', 'RMS norm'),
        (
            Layered(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1)), nn.AvgPool2d(3, 1, 1)),
            *('layers.0.0.weight layers.0.0.bias', '', 'convolution'),
        ),
        (
            Layered(ScaledStdConv2d(WIDTH, WIDTH, 1)),
            *('layers.0.gain layers.0.bias', 'layers.0.bias', 'convolution'),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)


@PLACES
def test_place_of_a_factor(block: nn.Module, parameters: str, biases: str, kind: str) -> None:
    model = network(copy.deepcopy(block), init='paper')
    nn.init.zeros_(model.block.ie.operators['ie'].gamma)  # another gate for each channel, the same for all images
    (place,) = factor_places(model)
    assert [one.name for one in place.parameters] == [f'block.{name}' for name in parameters.split()], place.reason
    assert [one.name for one in place.biases] == [f'block.{name}' for name in biases.split()]
    assert place.kind == kind
    images = torch.randn(3, *SIZE)
    with torch.no_grad():
        expected = model(images)
        (row,) = sem_timm.fold_gates(model, images).gates
        assert row.folded, row.reason
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert type(model.block) is type(block)


@PLACES
def test_a_shift_goes_into_a_bias(block: nn.Module, parameters: str, biases: str, kind: str) -> None:
    model = network(copy.deepcopy(block), 'ssf')
    images = torch.randn(3, *SIZE)
    with torch.no_grad():
        expected = model(images)
        (row,) = sem_timm.fold_gates(model, images).gates
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert row.folded == (type(model.block) is type(block)) == bool(biases)
    assert row.folded or row.reason.startswith('its shift has no place: ')


# Some torch before 2.9 cannot trace the layer, and so it is not read.
TRANSPOSED = 'conv_transpose2d in block.layers.0 does not pass a factor on' if TORCH >= (2, 9) else 'block.layers.0'


@pytest.mark.parametrize(
    ('block', 'reason'),
    [
        (ReadTwice(), 'conv in block is read by others as well'),
        (ReadElsewhere(), 'conv in block is read by others as well'),
        (FlippedChannels(), 'roll in block moves channels in a way that is not read'),
        (Numbered(), 'a term of add in block has no channels of its own'),
        (Layered(nn.GELU()), 'layers.0'),
        (Layered(nn.LayerNorm([WIDTH, 8, 8])), 'block.layers.0 works on another axis than the channels'),
        (Layered(nn.BatchNorm2d(WIDTH, affine=False)), 'block.layers.0 is a batch norm without weights'),
        (Layered(nn.Linear(8, 8)), 'block.layers.0 works on another axis than the channels'),
        (Layered(nn.ConvTranspose2d(WIDTH, WIDTH, 1)), TRANSPOSED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_factor_without_a_place(block: nn.Module, reason: str) -> None:
    model = network(block, init='paper')
    (place,) = factor_places(model)
    assert not place.parameters and reason in place.reason
    (row,) = sem_timm.fold_gates(model, torch.randn(2, *SIZE)).gates
    assert not row.folded and reason in row.reason


def test_layers_are_named_once() -> None:
    (place,) = factor_places(network(Scaled()))
    assert place.layers == ('block.scale',)
    (place,) = factor_places(network(Plain()))
    assert place.layers == ('block.conv',)


def test_places_need_no_weights() -> None:
    with torch.device('meta'):
        model = sem_timm.patch_model(timm.create_model('test_vit'), 'sem', branches='all')
    places = list(factor_places(model))
    assert [place.layers for place in places[:2]] == [('blocks.0.attn.proj',), ('blocks.0.mlp.fc2',)]
    assert all(isinstance(place, FactorPlace) and not place.reason for place in places)


def test_a_model_without_insertions_has_no_places() -> None:
    assert list(factor_places(timm.create_model('test_resnet'))) == []
