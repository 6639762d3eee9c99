"""The bottleneck ResNets for CIFAR on which SEM was published, as small as a test needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm after each; an attention sits after the last, before the add."""

    def __init__(self, inputs: int, width: int, stride: int, attention: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.attention = attention(outputs) if attention else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.attention(self.bn3(self.conv3(out))) + self.downsample(x))


def cifar_resnet(depth: int, num_classes: int, attention: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """A ResNet of ``9 n + 2`` layers, n bottlenecks in each of three stages; 164 has 18 of them, 83 has 9."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range((depth - 2) // 9):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1, attention))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
