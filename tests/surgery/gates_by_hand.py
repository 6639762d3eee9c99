"""The simplest gate there is, inserted and computed by hand."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import sem_timm
from sem_timm import ExcitationConfig


def instance_enhancement(model: nn.Module, **options: Any) -> dict[str, sem_timm.Excitation]:
    """Patches in the simplest gate there is, 2 sigmoid(gamma * mean + beta), with weights that tell channels apart."""
    sem_timm.patch_model(model.eval(), ExcitationConfig(excitation='ie', **options))
    gates = {}
    for site in sem_timm.patched_modules(model):
        for child in site.inserted:
            gate = model.get_submodule(f'{site.name}.{child}')
            nn.init.normal_(gate.operators.ie.gamma, generator=torch.Generator().manual_seed(2))
            nn.init.normal_(gate.operators.ie.beta, generator=torch.Generator().manual_seed(3))
            gates[f'{site.name}.{child}'] = gate
    return gates


def by_hand(gate: Any, branch: Tensor, axes: tuple[int, ...], shape: tuple[int, ...], skip: int = 0) -> Tensor:
    """The gated branch, pooled over ``axes`` from token ``skip`` on, with channels where ``shape`` has its -1."""
    mean = branch[:, skip:].mean(axes) if skip else branch.mean(axes)
    weights = 2 * torch.sigmoid(gate.operators.ie.gamma * mean + gate.operators.ie.beta)
    return branch * weights.view(len(branch), *shape)


def assert_gated_by_hand(
    model: nn.Module,
    images: Tensor,
    gates: dict[str, Any],
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    skip: int = 0,
) -> None:
    """Runs the model and compares what every gate returned with a computation by hand."""
    calls: dict[str, Any] = {}
    for name, gate in gates.items():
        gate.register_forward_hook(lambda gate, args, out, name=name: calls.update({name: (args, out)}))
    with torch.no_grad():
        model(images)
        for name, gate in gates.items():
            (branch, *shortcut), out = calls[name]
            expected = sum(shortcut, by_hand(gate, branch, axes, shape, skip))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # another order of the same sum


def vision_transformer(**options: Any) -> VisionTransformer:
    """As many tokens as channels: 16."""
    return VisionTransformer(img_size=64, embed_dim=16, depth=2, num_heads=2, num_classes=10, **options)
