"""Fashion-MNIST, 70,000 images of 28 x 28, from the idx files of Debian's package dataset-fashion-mnist."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import TensorDataset

from sem_timm.finetuning.builtin import FASHION_FOLDER, FashionMnist
from sem_timm.finetuning.errors import DataError

FOLDER = FASHION_FOLDER
MEAN, STD = 0.2860, 0.3530  # of the training images, scaled to 0 … 1


def fashion_mnist(folder: Path, part: str) -> TensorDataset:
    """The normalised images (N, 1, 28, 28) and labels of a part, 'train' or 't10k'.

    Raises:
        SystemExit: If the files are not in the folder; the message says where to get them.
    """
    try:
        data = FashionMnist(folder, train=part == 'train')
    except DataError as error:
        raise SystemExit(f'--data {folder}: {error}') from error
    images = torch.tensor(data.images).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return TensorDataset(images, torch.tensor(data.labels).long())


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 1, H, W) moved by up to 4 pixels in both directions over black, and mirrored or not."""
    count, _, height, width = images.shape
    padded = pad(images, (4, 4, 4, 4), value=-MEAN / STD)
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    sample = torch.arange(count).view(-1, 1, 1)
    return padded[sample, 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
