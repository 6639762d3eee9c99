"""What is compared on Fashion-MNIST: a residual network of the kind used on CIFAR, and a small vision transformer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

import sem_timm
from fashion.vit import Recipe

INPUT_SIZE = (1, 28, 28)


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        name: What it is called on the command line and in the log.
        title: What it is.
        operation: What `sem_timm.patch_model` does to the original; None for the original itself.
        options: The options of the operation.
        new_lr_scale: Learning rate of what it puts in, over that of the base.
    """

    name: str
    title: str
    operation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    new_lr_scale: float = 1.0


def _sem(name: str, title: str, *operators: str, new_lr_scale: float = 1.0, **options: Any) -> Variant:
    options.setdefault('init', 'paper')
    return Variant(name, title, 'sem', {'operators': operators or ('se', 'eca', 'ie'), **options}, new_lr_scale)


# Trained from scratch, so with the published initial values, but for the last two.
RESNETS = (
    Variant('plain', 'plain'),
    *(Variant(name, name.upper(), name, {'init': 'paper'}) for name in ('se', 'eca', 'ie')),
    _sem('sem', 'SEM: SE, ECA, IE'),
    _sem('sem-2', 'SEM of 2: SE, ECA', 'se', 'eca'),
    _sem('sem-4', 'SEM of 4: SE, ECA, IE, LCT', 'se', 'eca', 'ie', 'lct'),
    _sem('sem-5', 'SEM of 5: SE, ECA, IE, LCT, eSE', 'se', 'eca', 'ie', 'lct', 'ese'),
    _sem('sem-softmax', 'SEM, softmax decision', decision='softmax'),
    _sem('sem-no-decision', 'SEM, no decision', decision='equal'),
    _sem('sem-identity', 'SEM, started as an identity', init='identity'),
    _sem('sem-identity-10', 'SEM, started as an identity, rate x 10', init='identity', new_lr_scale=10.0),
)

VITS = (
    Variant('self-attention', 'self-attention'),
    Variant('external', 'External Attention', 'external'),
    Variant('eamlp', 'EAMLP', 'eamlp'),
    Variant('efficient', 'Efficient Attention', 'efficient'),
    Variant('linear', 'Linear Attention', 'linear'),
)

FAMILIES = {'resnet': RESNETS, 'vit': VITS}


def has_bottlenecks(depth: int, asked_for: bool = False) -> bool:
    """Whether a ResNet has bottlenecks: if asked for, and from 100 layers on."""
    return asked_for or depth >= 100


def check_depth(depth: int, bottlenecks: bool = False) -> None:
    """Refuses a depth that no network of this kind has.

    Raises:
        SystemExit: If it is none; the message says which there are.
    """
    per_block = 9 if has_bottlenecks(depth, bottlenecks) else 6
    if depth < per_block + 2 or (depth - 2) % per_block:
        raise SystemExit(
            f'--depth {depth}: these networks have 6n + 2 layers, such as 20 or 56; with --bottlenecks, and from 100 '
            'on, 9n + 2, such as 20, 56 or 164.'
        )


def resnet(depth: int, bottlenecks: bool = False, stem_stride: int = 1) -> nn.Module:
    """A ResNet for small images: three stages of widths 16, 32, 64, with timm's blocks.

    Each stage has n basic blocks, 6n + 2 layers in all; or, if asked for and from 100 layers on, n bottlenecks, 9n + 2
    layers, as in the ResNet-164 on which SEM was published. `stem_stride` is that of the first convolution: with 2, all
    maps have a quarter of the pixels.
    """
    check_depth(depth, bottlenecks)
    block, per_block = (Bottleneck, 9) if has_bottlenecks(depth, bottlenecks) else (BasicBlock, 6)
    count = (depth - 2) // per_block
    stem = nn.Conv2d(INPUT_SIZE[0], 16, 3, stem_stride, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for stage, width in enumerate((16, 32, 64)):
        for index in range(count):
            stride = 2 if stage and not index else 1
            outputs = width * block.expansion
            fits = stride == 1 and channels == outputs
            shortcut = None if fits else downsample_conv(channels, outputs, 1, stride)
            layers.append(block(channels, width, stride, shortcut))
            channels = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return model


def create(
    family: str, variant: Variant, depth: int, seed: int, bottlenecks: bool = False, stem_stride: int = 1
) -> nn.Module:
    """A model with new weights; variants of a family with one seed have the same weights but for what is inserted."""
    torch.manual_seed(seed)
    resnets = family == 'resnet'
    model = resnet(depth, bottlenecks, stem_stride) if resnets else Recipe(depth=depth, seed=seed).create()
    if variant.operation is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)  # it is trained from scratch
        return sem_timm.patch_model(model, variant.operation, input_size=INPUT_SIZE, **variant.options)
