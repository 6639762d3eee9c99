"""Does a gradient tell where a gate helps? The gate of each block trained alone, and what could be known before.

    pip install -e '.[demo]'
    python benchmarks/where.py --log docs/where.jsonl
    python benchmarks/where.py --log docs/where.jsonl --page docs/where.md

One row of JSON per set of images, seed and site, and one for the head alone; a run that was stopped goes on where it
was. Then, per set and seed, a row with what the gradients say, at all sites at once. The page is made of the rows,
without running anything.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sem_timm
from common.measuring import machine
from common.run_log import append_record, is_logged, read_log
from ranking.data import NUM_VALIDATION, SETS, Part, parts
from ranking.network import Head, block_names, features, frozen_network, in_batches, stem
from ranking.page import GRADIENTS, HEAD_ALONE
from ranking.scores import Gradients, gradients, scores
from ranking.text import page
from sem_timm.files import replace_whole

OPERATION = 'se'
DECAY = 0.03  # of heads; chosen by the head alone, on validation images of seed 0
HEAD_RATE = 3e-3


@dataclass(frozen=True)
class Setting:
    """How each gate is trained: on so many images, in so many epochs, with this learning rate for the gate."""

    images: int
    epochs: int
    batch_size: int
    gate_rate: float


SETTINGS = {'400 images': Setting(400, 4, 25, 1e-2), '1,000 images': Setting(1000, 3, 50, 3e-3)}
FIRST_SITE = 'blocks.3.0'  # blocks before it take most of the time


def shuffled(labels: Tensor, setting: Setting) -> Iterable[Tensor]:
    """Numbers of images, in batches."""
    return torch.randperm(len(labels)).split(setting.batch_size)


def train(
    forward: Callable[[Tensor], Tensor], gate: list[Any], x: tuple[Tensor, ...], inputs: Inputs, setting: Setting
) -> dict[str, Any]:
    """Trains a new head, and maybe a gate that is an identity at first; what came of it on the validation images.

    Args:
        forward: From an input of the last blocks, or from features, to features.
        gate: The parameters of the gate.
        x: Inputs for training and for validation.
        inputs: Features without the gate, and labels.
        setting: Epochs and the like.
    """
    labels = inputs.labels
    num_classes = int(labels[0].max()) + 1
    head = Head(inputs.base[0], num_classes, DECAY)
    optimizer = torch.optim.Adam(
        [{'params': head.parameters(), 'lr': HEAD_RATE}, {'params': gate, 'lr': setting.gate_rate}]
    )
    batches = [batch for _ in range(setting.epochs) for batch in shuffled(labels[0], setting)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    losses = []
    for batch in batches:
        values, wanted = forward(x[0][batch]), labels[0][batch]
        losses.append(float(F.cross_entropy(head(values), wanted).detach()))
        optimizer.zero_grad()
        head.objective(values, wanted).backward()
        optimizer.step()
        schedule.step()
    trained, judged = (in_batches(forward, part) for part in x)
    refitted = Head(trained, num_classes, DECAY).fit(trained, labels[0]).measured(judged, labels[1])
    one_epoch = losses[: len(batches) // setting.epochs]
    return {
        **head.measured(judged, labels[1]),
        'refitted_loss': refitted['loss'],
        'refitted_accuracy': refitted['accuracy'],
        'first_epoch': sum(one_epoch) / len(one_epoch),
    }


@dataclass(frozen=True)
class Inputs:
    """What is the same for all sites: inputs of each block and of the head, for training and validation."""

    blocks: dict[str, tuple[Tensor, ...]]
    base: tuple[Tensor, ...]
    labels: tuple[Tensor, Tensor]


def inputs_of(model: Any, images: tuple[Part, Part]) -> Inputs:
    """Runs the frozen network once on all images."""
    x = tuple(in_batches(partial(stem, model), part) for part in images)
    blocks = {}
    for name in block_names(model):
        if name >= FIRST_SITE:
            blocks[name] = x
        x = tuple(in_batches(model.get_submodule(name), part) for part in x)
    return Inputs(blocks, tuple(in_batches(partial(features, model, []), part) for part in x), _labels(images))


def _labels(images: tuple[Part, Part]) -> tuple[Tensor, Tensor]:
    return images[0].labels, images[1].labels


def train_site(model: Any, key: dict[str, Any], site: str, inputs: Inputs) -> dict[str, Any]:
    """Trains the gate of one block with a head, or the head alone; the row of it."""
    start, setting = time.process_time(), SETTINGS[key['setting']]
    if site == HEAD_ALONE:
        torch.manual_seed(key['seed'])
        row = train(lambda values: values, [], inputs.base, inputs, setting)
        return {**key, 'site': site, **row}
    torch.manual_seed(key['seed'])
    net = sem_timm.patch_model(copy.deepcopy(model), OPERATION, target=[site])
    gate = [parameter for parameter in net.parameters() if parameter.requires_grad]
    names = list(inputs.blocks)
    torch.manual_seed(key['seed'])  # the order of the images is that of the head alone
    row = train(partial(features, net, names[names.index(site) :]), gate, inputs.blocks[site], inputs, setting)
    size = {'parameters': sum(parameter.numel() for parameter in gate)}
    return {**key, 'site': site, **size, **row, 'cpu_seconds': round(time.process_time() - start, 1)}


def scored(model: Any, key: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, dict[str, float]]:
    """Scores by name and site, from the gradients in the logits of identity gates at all sites, kept in a file."""
    kept = folder / '{setting}-{set}-{seed}.pt'.format_map(key)
    sites = list(inputs.blocks)
    if not kept.exists():
        torch.manual_seed(key['seed'])
        net = sem_timm.patch_model(copy.deepcopy(model), OPERATION, target=sites)
        gates = {name: net.get_submodule(f'{name}.se_.operators.se') for name in sites}
        x, base, labels = inputs.blocks[sites[0]][0], inputs.base[0], inputs.labels[0]
        found = gradients(partial(features, net, sites), gates, x, labels, base, DECAY)
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(kept, lambda path: torch.save({site: vars(one) for site, one in found.items()}, path))
    stored = torch.load(kept, weights_only=True)
    by_site = {site: scores(Gradients(**stored[site])) for site in sites}
    return {name: {site: by_site[site][name] for site in sites} for name in by_site[sites[0]]}


def record(log: Path, row: dict[str, Any]) -> None:
    """Logs a row, with what it was measured on."""
    append_record(log, {**row, 'date': str(datetime.date.today()), 'machine': machine('cpu')})
    print(row, flush=True)


def facts() -> dict[str, str | int | float]:
    """Numbers of the set-up, for the page."""
    ways = [
        f'{one.images:,} images, {one.epochs} epochs, batches of {one.batch_size}, rate {one.gate_rate:g} for gates'
        for one in SETTINGS.values()
    ]
    numbers = {'decay': DECAY, 'head_rate': HEAD_RATE, 'first': FIRST_SITE, 'validation': NUM_VALIDATION}
    return {'settings': ', or '.join(ways), **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--log', type=Path, required=True, help='file of rows')
    parser.add_argument('--gradients', type=Path, default=Path('build/where'), help='folder that keeps gradients')
    parser.add_argument('--page', type=Path, help='write this page from the rows, and run nothing')
    parser.add_argument('--sets', nargs='+', choices=SETS, default=list(SETS), help='sets of images')
    parser.add_argument('--settings', nargs='+', choices=SETTINGS, default=['1,000 images'], help='ways to train')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    given = parser.parse_args()
    if given.page:
        given.page.write_text(page(read_log(given.log), facts()), encoding='utf-8')
        return
    model = frozen_network()
    for setting, seed, name in itertools.product(given.settings, given.seeds, given.sets):
        key = {'setting': setting, 'set': name, 'seed': seed}
        inputs = inputs_of(model, parts(name, seed, SETTINGS[setting].images))
        if not is_logged(read_log(given.log), {**key, 'site': GRADIENTS}):
            record(given.log, {**key, 'site': GRADIENTS, 'scores': scored(model, key, inputs, given.gradients)})
        for site in (HEAD_ALONE, *reversed(inputs.blocks)):  # the last blocks are the quickest
            if not is_logged(read_log(given.log), {**key, 'site': site}):
                record(given.log, train_site(model, key, site, inputs))


if __name__ == '__main__':
    main()
