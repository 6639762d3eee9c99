r"""SEM against plain, SE, ECA and IE in a residual network, and five attentions in a transformer, on Fashion-MNIST.

    python benchmarks/fashion_mnist.py --data FOLDER
    python benchmarks/fashion_mnist.py --data FOLDER --device cuda --depth 164 --epochs 60 --train-images 60000
    python benchmarks/fashion_mnist.py --data FOLDER --bottlenecks --stem-stride 2 --schedule drops --epochs 8 \
        --train-images 60000 --batch-size 128
    python benchmarks/fashion_mnist.py --render

One recipe for all variants of a family, the same weights, images and crops for all variants of a seed; accuracy is that
on the 10,000 test images after the last epoch. Finished trainings are in the log and are not repeated, and one that was
stopped goes on after its last whole epoch; all of the first seed come before those of the second. Several processes
share the work with ``--part 0/2`` and ``--part 1/2``. At the end, and with ``--render`` at once, docs/results.md and
docs/results.png are made of all that is in the log.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sem_timm
from common.measuring import machine
from common.run_log import append_record, is_logged, read_log
from fashion.data import FOLDER, fashion_mnist
from fashion.models import FAMILIES, check_depth
from fashion.plot import draw
from fashion.results import markdown, sections
from fashion.stopped import kept_file
from fashion.training import AUGMENTATIONS, Run, Setting, cost, train_and_measure
from fashion.vit import Recipe

DOCS = Path(__file__).parents[1] / 'docs'
PRECISIONS = {'resnet': 'bfloat16', 'vit': 'float32'}  # where each is fastest on a CPU
# A transformer that sees few images learns too little from crops to be compared by them.
DEFAULT_AUGMENTATIONS = {'resnet': AUGMENTATIONS, 'vit': ('none',)}
NAMES = [variant.name for variants in FAMILIES.values() for variant in variants]
_ELSEWHERE = ('data', 'log', 'docs', 'part', 'only', 'seeds', 'render', 'stopped')  # what figures do not depend on


def part_of(text: str) -> tuple[int, int]:
    """What ``--part`` means: which of how many parts, counted from 0."""
    part, _, parts = text.partition('/')
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form 0/2 and 1/2')
    return int(part), int(parts)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=FOLDER, help='folder of the idx files')
    parser.add_argument('--log', type=Path, default=DOCS / 'results.jsonl', help='file of finished trainings')
    parser.add_argument('--docs', type=Path, default=DOCS, help='folder for results.md and results.png')
    parser.add_argument('--render', action='store_true', help='only make these of the log')
    parser.add_argument(
        '--part', type=part_of, default=(0, 1), metavar='I/N', help='which of several processes this is'
    )
    parser.add_argument('--only', nargs='+', choices=NAMES, default=NAMES, metavar='NAME', help=', '.join(NAMES))
    parser.add_argument('--augmentation', nargs='+', choices=AUGMENTATIONS, help='by default both, for ViT none')
    parser.add_argument('--seeds', type=int, default=3, help='how many, from 0 up')
    parser.add_argument('--depth', type=int, default=20, help='layers of the residual network')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--train-images', type=int, default=10_240, help='the first so many of 60,000')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--precision', choices=('float32', 'bfloat16'), help='by default bfloat16 for ResNets')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--bottlenecks', action='store_true', help='below 100 layers, too')
    parser.add_argument(
        '--stem-stride', type=int, choices=(1, 2), default=1, help='of the first convolution of ResNets'
    )
    parser.add_argument('--schedule', choices=('cosine', 'drops'), default='cosine', help='drops: two, as published')
    parser.add_argument(
        '--stopped', type=Path, default=Path('build/stopped'), help='folder of what stopped trainings go on from'
    )
    typed = parser.parse_args(given)
    check_depth(typed.depth, typed.bottlenecks)
    return typed


def planned(typed: argparse.Namespace) -> list[Run]:
    """All trainings, those of one seed before those of the next."""
    settings = {
        family: Setting(
            family=family,
            depth=typed.depth if family == 'resnet' else Recipe.depth,
            train_images=typed.train_images,
            epochs=typed.epochs,
            batch_size=typed.batch_size,
            precision=typed.precision or PRECISIONS[family],
            device=typed.device,
            schedule=typed.schedule if family == 'resnet' else 'cosine',
            bottlenecks=typed.bottlenecks and family == 'resnet',
            stem_stride=typed.stem_stride if family == 'resnet' else 1,
        )
        for family in FAMILIES
    }
    return [
        Run(settings[family], variant, augmentation, seed)
        for seed in range(typed.seeds)
        for family, variants in FAMILIES.items()
        for augmentation in typed.augmentation or DEFAULT_AUGMENTATIONS[family]
        for variant in variants
        if variant.name in typed.only
    ]


def circumstances(typed: argparse.Namespace) -> dict[str, Any]:
    """What is kept of the command, the machine and the versions beside each figure."""
    options = [
        f'--{name.replace("_", "-")}' + ('' if value is True else f' {value}')
        for name, value in vars(typed).items()
        if name not in _ELSEWHERE and name != 'augmentation' and value not in (None, False)
    ]
    return {
        'command': ' '.join(['python benchmarks/fashion_mnist.py', *options]),
        'machine': machine(typed.device),
        'sem_timm': sem_timm.__version__,
        'python': sys.version.split()[0],
        'date': datetime.date.today().isoformat(),
    }


def measure_costs(settings: Sequence[Setting], typed: argparse.Namespace) -> None:
    """Logs what a training step costs where the log does not have it."""
    for setting in settings:
        key = {'kind': 'cost', 'setting': setting.key}
        logged = [record['ratios'] for record in read_log(typed.log) if is_logged([record], key)]
        names = {variant.name for variant in FAMILIES[setting.family] if variant.name in typed.only}
        missing = names.difference(*logged)
        if missing:
            append_record(typed.log, {**key, 'ratios': cost(setting, missing), **circumstances(typed)})


def train_all(runs: Sequence[Run], typed: argparse.Namespace) -> None:
    """Trains what the log does not have, and logs it."""
    train, test = fashion_mnist(typed.data, 'train'), fashion_mnist(typed.data, 't10k')
    for number, run in enumerate(runs, 1):
        key = {'kind': 'run', **run.key}
        if not is_logged(read_log(typed.log), key):
            figures = train_and_measure(run, train, test, typed.stopped)
            append_record(typed.log, {**key, **figures, **circumstances(typed)})
            print(f'{number} of {len(runs)}: {run}: {figures["accuracy"]} %, {figures["seconds"]} s', flush=True)
        kept_file(typed.stopped, run.key).unlink(missing_ok=True)


def main(given: Sequence[str] | None = None) -> None:
    typed = arguments(given)
    torch.set_num_threads(typed.threads)
    if not typed.render:
        part, parts = typed.part
        runs = planned(typed)
        if part == 0:
            measure_costs(list(dict.fromkeys(run.setting for run in runs)), typed)
        train_all(runs[part::parts], typed)
    found = sections(read_log(typed.log))
    if not found:
        raise SystemExit(f'{typed.log} has no finished training; leave --render to train.')
    draw(found, typed.docs / 'results.png')
    (typed.docs / 'results.md').write_text(markdown(found), encoding='utf-8')


if __name__ == '__main__':
    main()
