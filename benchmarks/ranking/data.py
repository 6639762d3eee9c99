"""Small sets of real images in three parts, for the experiment on where a gate helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fashion.data import FOLDER, MEAN, STD, fashion_mnist

IMAGE_SIZE = 64
NUM_VALIDATION = 800


@dataclass(frozen=True)
class Part:
    """Images of any size (N, 1, H, W), from 0 to 1, and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, start: int, stop: int) -> Tensor:
        """Some of the images as the network takes them, (n, 3, 64, 64), from -1 to 1."""
        enlarged = F.interpolate(self.images[start:stop], size=IMAGE_SIZE, mode='bilinear', antialias=True)
        return (enlarged * 2 - 1).expand(-1, 3, -1, -1)


def _clothes() -> tuple[Tensor, Tensor]:
    images, labels = fashion_mnist(FOLDER, 'train').tensors
    return images * STD + MEAN, labels


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target).long()


SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {'fashion-mnist': _clothes, 'digits': _digits}


def parts(name: str, seed: int, num_train: int) -> tuple[Part, Part]:
    """Images for training, and for validation; the latter are the same for all seeds."""
    images, labels = SETS[name]()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    validation, rest = order[:NUM_VALIDATION], order[NUM_VALIDATION:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1000 + seed))[:num_train]]
    return Part(images[drawn], labels[drawn]), Part(images[validation], labels[validation])
