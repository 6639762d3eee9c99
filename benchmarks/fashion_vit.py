"""A small vision transformer trained on Fashion-MNIST: the original that attention transfer is measured on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from fashion_data import MEAN, STD
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Recipe:
    """The original and its training.

    Attributes:
        depth: Number of blocks.
        dim: Width.
        num_heads: Heads of attention.
        epochs: Passes over the training images.
        batch_size: Images in a batch.
        learning_rate: Its peak, of AdamW.
        seed: Of the weights and of the order of images.
    """

    depth: int = 4
    dim: int = 64
    num_heads: int = 4
    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 2e-3
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


def train(model: nn.Module, images: TensorDataset, recipe: Recipe, device: str) -> float:
    """Trains a model from its new weights; returns the seconds that took."""
    loader = DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(model, 'adamw', lr=recipe.learning_rate, weight_decay=0.05)
    steps = recipe.epochs * len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        'cosine',
        num_epochs=recipe.epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
        warmup_epochs=0.2,
        warmup_lr=1e-5,
    )
    start, step = time.perf_counter(), 0
    model.to(device).train()
    for _ in range(recipe.epochs):
        for batch, labels in loader:
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
            loss = cross_entropy(model(batch.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            if step % 100 == 0:
                print(f'training the original: step {step} of {steps}, loss {loss.item():.3f}', flush=True)
    model.eval()
    return time.perf_counter() - start


def original(images: TensorDataset, recipe: Recipe, device: str, weights: Path | None) -> tuple[nn.Module, float]:
    """The trained original, and the seconds its training took; read from a file of weights, or kept in it."""
    model = recipe.create()
    if weights is not None and weights.exists():
        kept = torch.load(weights, weights_only=True)
        model.load_state_dict(kept['model'])
        return model.to(device).eval(), kept['seconds']
    seconds = train(model, images, recipe, device)
    if weights is not None:
        torch.save({'model': model.state_dict(), 'seconds': seconds}, weights)
    return model, seconds
