"""Fashion-MNIST, 70,000 images of 28 x 28, from the idx files of Debian's package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import TensorDataset

FOLDER = Path('/usr/share/datasets/fashion-mnist')
MEAN, STD = 0.2860, 0.3530  # of the training images, scaled to 0 … 1

_HEADERS = {'images-idx3': 16, 'labels-idx1': 8}  # bytes before the numbers


def fashion_mnist(folder: Path, part: str) -> TensorDataset:
    """The normalised images (N, 1, 28, 28) and labels of a part, 'train' or 't10k'.

    Raises:
        SystemExit: If the files are not in the folder; the message says where to get them.
    """
    images, labels = (_numbers(folder / f'{part}-{kind}-ubyte.gz', header) for kind, header in _HEADERS.items())
    scaled = images.view(-1, 1, 28, 28).float().div_(255).sub_(MEAN).div_(STD)
    return TensorDataset(scaled, labels.long())


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


def _numbers(path: Path, header: int) -> Tensor:
    if not path.is_file():
        raise SystemExit(
            f'{path} does not exist. Fashion-MNIST is in the Debian package dataset-fashion-mnist:\n'
            '  apt-get install dataset-fashion-mnist\n'
            'or, without being root,\n'
            '  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb data\n'
            'and then --data data/usr/share/datasets/fashion-mnist'
        )
    with gzip.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())
