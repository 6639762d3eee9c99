"""Attention transfer on Fashion-MNIST: what a small vision transformer loses by a swap of its attention and wins back.

    python benchmarks/transfer.py --data FOLDER --weights vit.pt

Trains the original once, or reads it from the file of weights, swaps its attention for External Attention, and compares
ways to initialise the memories and to train them on a tenth of the training images. Writes docs/transfer.json,
which docs/transfer.md explains. With a GPU: ``--device cuda --depth 12 --dim 192``.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fashion_data import FOLDER, fashion_mnist
from fashion_vit import Recipe, original
from measuring import machine
from torch import nn
from torch.utils.data import DataLoader, Subset

import sem_timm

DOCS = Path(__file__).parents[1] / 'docs'

# Ways to initialise, as fields of TransferOptions.
STARTS: dict[str, dict[str, Any]] = {
    'k-means of keys, mean values': {'keys': 'keys', 'values': 'means', 'sharpness': (1.0,)},
    'k-means of keys, mean values, sharpness chosen': {'keys': 'keys', 'values': 'means'},
    'k-means of queries, least squares, sharpness chosen': {'keys': 'queries'},
    'k-means of keys, least squares': {'keys': 'keys', 'sharpness': (1.0,)},
    'k-means of keys, least squares, sharpness chosen': {'keys': 'keys'},
    'keys as swapped, least squares': {'sharpness': (1.0,)},
    'keys as swapped, least squares, sharpness chosen': {},
}


def trainings(passes: int) -> dict[str, dict[str, Any]]:
    """Ways to train after the last of the starts, as fields of TransferOptions."""
    stages = ('initialize', 'match', 'distill')
    longest = {'train': 'module', 'stages': stages, 'epochs': passes, 'learning_rate': 4e-3}
    gently = {'distill_epochs': 2, 'distill_learning_rate': 3e-4}  # the memories are sensitive after a fit
    return {
        'new parameters, 1 pass': {},
        'with the output projection, 1 pass': {'train': 'projection'},
        'all of the swapped modules, 1 pass': {'train': 'module'},
        'the same, from k-means of keys, 1 pass': {'train': 'module', 'keys': 'keys'},
        f'with the output projection, {passes} passes': {**longest, 'train': 'projection', 'stages': stages[:2]},
        f'all of the swapped modules, {passes} passes': {**longest, **gently},
    }


def measured(base: nn.Module, loader: Any, evaluation: Any, memory: int, **options: Any) -> Any:
    """The result of one transfer on a copy of the original."""
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, 'external', memory=memory)
    return sem_timm.transfer(model, loader, evaluation=evaluation, **options)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=FOLDER, help='folder of the idx files')
    parser.add_argument('--weights', type=Path, help='file that keeps the trained original')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--depth', type=int, default=Recipe.depth)
    parser.add_argument('--dim', type=int, default=Recipe.dim)
    parser.add_argument('--memory', type=int, default=64, help='slots')
    parser.add_argument('--images', type=int, default=6000, help='training images that the transfer may see')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--passes', type=int, default=14, help='passes over them in the longest training')
    parser.add_argument('--test-images', type=int, default=5000, help='test images that accuracy is measured on')
    parser.add_argument('--only', default='', help='run the ways whose name has this text, and keep other figures')
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.device == 'cpu':
        torch.set_num_threads(1)
    train, test = fashion_mnist(given.data, 'train'), fashion_mnist(given.data, 't10k')
    recipe = Recipe(depth=given.depth, dim=given.dim)
    base, seconds = original(train, recipe, given.device, given.weights)
    loader = DataLoader(Subset(train, range(given.images)), given.batch_size, shuffle=True)
    evaluation = DataLoader(Subset(test, range(given.test_images)), 500)
    start = time.perf_counter()
    kept = json.loads((DOCS / 'transfer.json').read_text()) if given.only else {}
    figures: dict[str, Any] = {part: kept.get(part, {}) for part in ('starts', 'trainings')}
    plans = {'starts': {name: {**how, 'stages': ('initialize',)} for name, how in STARTS.items()}}
    plans['trainings'] = trainings(given.passes)
    for part, ways in plans.items():
        for name, how in [(name, how) for name, how in ways.items() if given.only in name]:
            result = measured(base, loader, evaluation, given.memory, **how)
            print(f'{name}\n{result}\n', flush=True)
            figures[part][name] = result.to_dict()
    figures = {
        'date': datetime.date.today().isoformat(),
        'command': ' '.join(['python benchmarks/transfer.py', *(f'--{k} {v}' for k, v in shown(given).items())]),
        'machine': machine(given.device),
        'sem_timm': sem_timm.__version__,
        'python': sys.version.split()[0],
        'original': {**asdict(recipe), 'training_seconds': round(seconds, 1), 'training_images': len(train)},
        'seconds': round(kept.get('seconds', 0) + time.perf_counter() - start, 1),
        **figures,
    }
    (DOCS / 'transfer.json').write_text(json.dumps(rounded(figures)) + '\n')


def rounded(figures: Any) -> Any:
    """Figures with five decimals."""
    if isinstance(figures, dict):
        return {name: rounded(entry) for name, entry in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [rounded(entry) for entry in figures]
    return round(figures, 5) if isinstance(figures, float) else figures


def shown(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments that figures depend on; where files lie is not one of them."""
    return {
        name.replace('_', '-'): value for name, value in vars(given).items() if name not in ('data', 'weights', 'only')
    }


if __name__ == '__main__':
    main()
