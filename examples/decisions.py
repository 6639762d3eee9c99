"""Which excitation does each block choose? A small ResNet with SEM learns to read digits, and shows its decisions.

Trains timm's ResNet-50 with an eighth of its width on scikit-learn's digits for about a minute on two cores, without a
network, then takes the statistics of all decisions over the test half and draws them.

    python examples/decisions.py docs/decisions.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sem_timm

NARROW: dict[str, Any] = {'channels': (8, 16, 32, 64), 'stem_width': 8, 'in_chans': 1}
IMAGE_SIZE = 32
EPOCHS = 20
SEED = 0


def load_halves() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 digits, enlarged and normalised, in a fixed random split for training and test."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None]
    images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode='bilinear', antialias=True)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    train, test = order.tensor_split(2)
    labels = torch.from_numpy(digits.target)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train all weights with timm's AdamW and its cosine schedule with warm-up."""
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    steps = epochs * len(loader)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=4e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, t_in_epochs=False)
    model.train()
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            schedule.step_update(step)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f'epoch {epoch + 1:2} of {epochs}: loss {loss.item():.3f}', flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of images named correctly."""
    images, labels = data.tensors
    return (model.eval()(images).argmax(-1) == labels).float().mean().item()


def main(path: Path, epochs: int = EPOCHS) -> sem_timm.Decisions:
    """Train, measure, print and draw."""
    torch.manual_seed(SEED)
    model = timm.create_model('resnet50_sem', num_classes=10, **NARROW)
    learned, held_out = load_halves()
    train(model, learned, epochs)
    print(f'{accuracy(model, held_out):.1%} of {len(held_out)} test images are read right.\n')
    decisions = sem_timm.decisions(model, DataLoader(held_out, batch_size=128), by_class=True)
    print(decisions)
    print(f'\nDrawn to {decisions.plot(path)}.')
    return decisions


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', type=Path, nargs='?', default=Path('decisions.png'), help='PNG, SVG or PDF to write')
    main(parser.parse_args().picture)
