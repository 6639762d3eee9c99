"""A small vision transformer for Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from fashion.data import MEAN, STD


@dataclass(frozen=True)
class Recipe:
    """The model.

    Attributes:
        depth: Number of blocks.
        dim: Width.
        num_heads: Heads of attention.
        seed: Of the weights.
    """

    depth: int = 4
    dim: int = 64
    num_heads: int = 4
    seed: int = 0

    def create(self) -> nn.Module:
        """The model with new weights: 49 patches of 4 x 4 and a class token."""
        torch.manual_seed(self.seed)
        sizes: dict[str, Any] = {'embed_dim': self.dim, 'depth': self.depth, 'num_heads': self.num_heads}
        normalization: dict[str, Any] = {'mean': (MEAN,), 'std': (STD,), 'input_size': (1, 28, 28)}
        return timm.create_model(
            'vit_tiny_patch16_224',
            img_size=28,
            patch_size=4,
            in_chans=1,
            num_classes=10,
            **sizes,
            pretrained_cfg_overlay=normalization,
        )
