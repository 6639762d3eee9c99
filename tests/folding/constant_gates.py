"""Gates that do not depend on the image, and gates that do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sem_timm
from sem_timm.layers import ChannelGate
from tests.twins import trained


def gates_of(model: nn.Module) -> dict[str, ChannelGate]:
    """The gates of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ChannelGate)}


def gated(model: nn.Module, operation: Any = 'sem', **options: Any) -> nn.Module:
    """A patched model whose gates depend on the image, each channel's otherwise."""
    return trained(sem_timm.patch_model(model, operation, **options)).eval()


def make_constant(model: nn.Module) -> nn.Module:
    """Gates that are other numbers for each channel, and the same for all images: weights of zero, biases that differ.

    For 'ie', whose gate is sigmoid(gamma * mean + beta).
    """
    generator = torch.Generator().manual_seed(7)
    for gate in gates_of(model).values():
        operator: Any = gate.operators['ie']
        nn.init.zeros_(operator.gamma)
        nn.init.uniform_(operator.beta, -1.5, 1.5, generator=generator)
    return model
