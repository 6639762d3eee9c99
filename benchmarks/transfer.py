"""Attention transfer on a trained ViT-S: what a swap of all its attention loses, and what each stage wins back.

    pip install -e '.[transformer]'
    python benchmarks/transfer.py --log docs/transfer.jsonl
    python benchmarks/transfer.py --log docs/transfer.jsonl --page docs/transfer.md

One row of JSON per swap, seed and stage; a run that was stopped goes on where it was. Model, images and splits are
those of transferred/vit.py. The page is made of the rows, without running anything.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sem_timm
from common.measuring import machine
from common.run_log import append_record, is_logged, read_log
from fashion.data import FOLDER
from sem_timm import AttentionCore
from sem_timm.layers.recording import traced_as_leaf
from transferred.page import IN_SIX, page, shown_rows
from transferred.plot import draw
from transferred.vit import loader, original, split


class MeanOfValues(AttentionCore):
    """No attention: each token gets the mean of the values. What does no better is not worth its name."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        return v.mean(-2, keepdim=True).expand_as(v)


# The swaps, by what the page calls them: the attention and its options.
BOTH = {'own': True, 'local': True}
SWAPS: dict[str, tuple[Any, dict[str, Any]]] = {
    'mean of v': (MeanOfValues, {}),
    'monarch': ('monarch', {}),
    'external': ('external', {}),
    'linear': ('linear', {}),
    'efficient': ('efficient', {}),
    'mean of v, own, local': (MeanOfValues, BOTH),
    'external, own, local': ('external', BOTH),
    'linear, own, local': ('linear', BOTH),
    'efficient, own, local': ('efficient', BOTH),
}


@dataclass(frozen=True)
class Chain:
    """Stages that follow each other, from a swap on, with the options of each."""

    swap: str
    stages: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    def names(self) -> list[str]:
        """What the model has behind it after each stage."""
        told = []
        for stage, options in self.stages:
            told.append(' '.join((stage, *(f'{name}={value}' for name, value in options))))
        return [' + '.join(told[: number + 1]) for number in range(len(told))]


def chain(swap: str, *stages: str | tuple[str, dict[str, Any]]) -> Chain:
    """A chain of stages, as names or with options."""
    pairs = [(stage, {}) if isinstance(stage, str) else stage for stage in stages]
    return Chain(swap, tuple((stage, tuple(sorted(options.items()))) for stage, options in pairs))


FITTED = [name for name in SWAPS if name.endswith('local')]
MATCH = ('match', {'train': 'module'})
FITTING = ('initialize', {'calibration_images': 3000})
LITERATURE = {'features_learning_rate': 1e-4, 'features_alone': 0.25, 'warmup': 0.05}
CHAINS = {
    'literature': [chain('external, own, local', 'initialize', ('features', LITERATURE))],
    'features': [chain(name, 'initialize', 'features') for name in (*FITTED, 'external')],
    'fit': [chain('external', ('initialize', {'calibration_images': n})) for n in (200, 600)],
    'rates': [
        chain('external', 'initialize', ('match', options))
        for options in (
            *({'train': 'module', 'base_learning_rate': rate, 'warmup': 0.05} for rate in (2e-3, 4e-4, 1e-4)),
            {'train': 'new', 'warmup': 0.05},
        )
    ],
    'curve': [chain('linear, own, local', ('initialize', {'calibration_images': n})) for n in (200, 600)],
    'fitted': [chain(name, FITTING) for name in FITTED],
    'inputs': [chain(name, ('initialize', {'inputs': 'original'})) for name in FITTED],
    'swaps': [chain(name) for name in SWAPS if name not in FITTED],  # whose maps are zero at first
    'match': [chain(name, 'initialize', MATCH, 'features') for name in ('external', 'external, own, local')],
    'alone': [chain('external', stage) for stage in (MATCH, 'features')],
}


def swapped(base: nn.Module, name: str, seed: int, target: list[str] | None = None) -> nn.Module:
    """The original with another attention in all blocks, or in some."""
    attention, options = SWAPS[name]
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        return sem_timm.patch_model(model, attention, target=target, **options)


@torch.no_grad()
def measured(model: nn.Module, data: Any, amp: bool) -> dict[str, float]:
    """Accuracy in percent."""
    if not len(data):
        return {}
    right = 0
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        for images, labels in loader(data, 50):
            right += int((model(images).argmax(1) == labels).sum())
    return {'accuracy': 100 * right / len(data)}


def run(
    base: nn.Module, steps: Chain, seed: int, given: argparse.Namespace, log: Path, target: list[str] | None = None
) -> None:
    """Runs what of a chain is not logged, and logs each stage."""
    common = {'data': given.data.name, 'swap': steps.swap, 'seed': seed, 'images': given.images, 'split': given.split}
    common['amp'] = given.amp
    names = steps.names() or ['']
    known = read_log(log)
    if all(is_logged(known, {**common, 'stages': name}) for name in names):
        return
    evaluation = split(given.data, given.split, given.test_images)
    training = loader(split(given.data, 'transfer', given.images), given.batch_size, shuffle=True, seed=seed)
    shared = {'seed': seed, 'amp_dtype': 'bfloat16' if given.amp else None, 'calibration_images': 200}
    seen = 0
    model = swapped(base, steps.swap.removesuffix(IN_SIX), seed, target)
    if not steps.stages:
        record(log, {**common, 'stages': '', 'images_seen': 0, **measured(model, evaluation, given.amp)}, given)
    for name, (stage, options) in zip(names, steps.stages):
        result, model, seconds = after(model, stage, training, {**shared, **dict(options)}, repr((common, name)))
        seen += result[stage].images_seen
        row = {
            **common,
            'stages': name,
            'images_seen': seen,
            'cpu_seconds': round(seconds, 1),
            'mean_error': result[stage].mean_error,
            'losses': [round(loss, 4) for loss in result[stage].losses],
        }
        if not is_logged(known, {**common, 'stages': name}):
            record(log, {**row, **measured(model, evaluation, given.amp)}, given)


def search(base: nn.Module, swap: str, seed: int, given: argparse.Namespace) -> None:
    """Which six blocks lose the least, by images of the choosing split; then these are swapped, fitted and measured."""
    key = {'data': given.data.name, 'swap': f'{swap}{IN_SIX}', 'stages': 'search', 'seed': seed}
    if (known := next((row for row in read_log(given.log) if key.items() <= row.items()), None)) is None:
        attention, options = SWAPS[swap]
        start = time.process_time()
        shown = loader(split(given.data, 'choosing', given.search_images), 32, shuffle=True, seed=seed)
        dtype = 'bfloat16' if given.amp else None
        plan = sem_timm.search(base, attention, shown, tolerance=0.5, amp_dtype=dtype, seed=seed, **options)
        found = {
            'cpu_seconds': round(time.process_time() - start, 1),
            'blocks': list(plan.front[min(6, len(plan.front) - 1)].swapped),
            'front': plan.to_dict()['front'],
            'search_images': given.search_images,
        }
        record(given.log, known := {**key, **found}, given)
    run(base, chain(key['swap'], FITTING), seed, given, given.log, target=known['blocks'])


# What 'initialize' gave, for the chains that begin with it.
_begun: dict[str, tuple[Any, nn.Module, float]] = {}


def after(
    model: nn.Module, stage: str, training: Any, options: dict[str, Any], key: str
) -> tuple[Any, nn.Module, float]:
    """Result, model and seconds of a processor after a stage."""
    if key not in _begun:
        start = time.process_time()
        result = sem_timm.transfer(model, training, stages=(stage,), **options)
        found = result, model, time.process_time() - start
        if stage != 'initialize':
            return found
        _begun[key] = found
    result, model, seconds = _begun[key]
    return result, copy.deepcopy(model), seconds


def record(log: Path, row: dict[str, Any], given: argparse.Namespace) -> None:
    """Logs a row, with what it was measured on."""
    versions = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__}
    context = {'test_images': given.test_images, 'amp': given.amp, 'date': str(datetime.date.today()), **versions}
    append_record(log, {**row, **context, 'machine': machine('cpu')})
    accuracy = f'{row["accuracy"]:.1f} %' if 'accuracy' in row else ''
    print(f'{row["swap"]}, {row["stages"]}, seed {row["seed"]}: {accuracy}', flush=True)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=FOLDER, help='folder of the idx files')
    parser.add_argument('--head', type=Path, default=Path('build/transfer_head.pt'), help='file that keeps the head')
    parser.add_argument('--log', type=Path, required=True, help='file of rows')
    parser.add_argument('--page', type=Path, help='write this page from the rows, and run nothing')
    parser.add_argument('--images', type=int, default=6000, help='images that a transfer may see')
    parser.add_argument('--batch-size', type=int, default=50)
    parser.add_argument('--split', default='reporting', choices=('choosing', 'reporting'))
    parser.add_argument(
        '--test-images', type=int, default=1000, help='of the split, that accuracy is measured on; 0 for no accuracy'
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    groups = (*CHAINS, 'search')
    parser.add_argument('--only', nargs='+', choices=groups, default=groups, help='groups of rows')
    parser.add_argument('--search-images', type=int, default=64, help='of the choosing split, that search looks at')
    parser.add_argument('--amp', action='store_true', help='compute in bfloat16 where that is precise enough')
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.page:
        rows = read_log(given.log)
        given.page.write_text(page(rows))
        draw(shown_rows(rows), given.page.with_suffix('.png'))
        return
    torch.set_num_threads(1)
    base = original(given.data, given.head, given.amp)
    key = {'data': given.data.name, 'swap': 'original', 'stages': '', 'seed': 0}
    key.update(images=given.images, split=given.split)
    if not is_logged(read_log(given.log), key):
        evaluation = split(given.data, given.split, given.test_images)
        record(given.log, {**key, 'images_seen': 0, **measured(base, evaluation, given.amp)}, given)
    for group in given.only:
        for seed in given.seeds:
            for swap in ('external, own, local', 'external') if group == 'search' else ():
                search(base, swap, seed, given)
            for steps in CHAINS.get(group, ()):
                run(base, steps, seed, given, given.log)


if __name__ == '__main__':
    main()
