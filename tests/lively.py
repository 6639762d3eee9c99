"""Models whose branches all reach the output, so that a comparison shows what is done to a branch."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar('Model', bound=nn.Module)


def lively(model: Model, generator: torch.Generator | None = None) -> Model:
    """Sets norms, biases and layer scales, and whatever else is zero, to numbers between 0.5 and 1.

    timm starts the last norms of residual branches, layer scales and heads at zero or close to it in some families.
    What a gate does to such a branch does not show in the output, and any comparison of outputs would pass.
    """
    for parameter in model.parameters():
        if parameter.ndim <= 1 or not parameter.any():
            nn.init.uniform_(parameter, 0.5, 1.0, generator=generator)
    return model
