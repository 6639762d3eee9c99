"""``sem-timm compare``: which operation, where, on one's own images."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import sys
from typing import Annotated, Any

import torch
import typer

from sem_timm.command_line.fields import flag_of, give_parameters, keyword, parameters_of
from sem_timm.comparison import CompareOptions
from sem_timm.comparison.calls import run_comparison
from sem_timm.comparison.options import OF_MACHINES, RECIPE
from sem_timm.errors import OptionError
from sem_timm.finetuning import FinetuneOptions
from sem_timm.typed_values import parse_pairs

_LISTS = ('operations', 'target', 'position')
_TEXTS = ('train', 'seeds', 'lr_factors')
_HELPS = {
    'tuning_fraction': 'Share of the training images that is held out in the tries of --search, by default 0.2.',
    'split_seed': 'Seed of what is held out, for all seeds of runs alike; by default 0.',
}


def command(as_json: bool, **values: Any) -> None:
    """Compare operations on your own images: paired runs over several seeds, intervals, and what each costs.

    Runs with the same seed differ in nothing but the operation: same images in the same order, same augmentation, same
    initial weights. Prints a table and what can be told from it; the folder has the log, CSV, JSON, Markdown, LaTeX and
    a picture. Ctrl-C and worse lose at most the run in progress; `--resume FOLDER` goes on, and adds rows and seeds.

    Without any argument: an ImageNet network, frozen, or without the extra `demo` a small one, and a few handwritten
    digits; in two to three minutes on two cores.

    Examples: `sem-timm compare`, `sem-timm compare resnet18 --data photos/ --operations none,se,eca,sem,timm_cbam`,
    `sem-timm compare resnet50 --data photos/ --operations "none sem sem:operators=eca,ie" --train new,all --search lr`,
    `sem-timm compare --resume comparisons/my-comparison --operations ie --seeds 10`.
    """
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    if 'model_options' in typed:
        typed['model_options'] = parse_pairs(typed['model_options'], flag_of('model_options', {}))
    if 'train' in typed:
        typed['train'] = tuple(part for part in typed['train'].split(',') if part)
    if 'seeds' in typed:
        typed['seeds'] = parse_seeds(typed['seeds'])
    if 'lr_factors' in typed:
        typed['lr_factors'] = _numbers(typed['lr_factors'])
    line = shlex.join(['sem-timm', *sys.argv[1:]]) if sys.argv[1:2] == ['compare'] else None
    result = run_comparison(typed, line)
    if int(os.environ.get('RANK', 0)) == 0:
        print(json.dumps(result.to_dict(), indent=1) if as_json else f'{result}\nTables and log: {result.folder}')
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_seeds(text: str) -> int | tuple[int, ...]:
    """Reads how many seeds there are to be, or which: ``5``, ``0-2`` or ``3,7``.

    Raises:
        OptionError: If it is neither.
    """
    if text.isdecimal():
        return int(text)
    seeds: list[int] = []
    for part in text.split(','):
        found = re.fullmatch(r'(\d+)(?:-(\d+))?', part.strip())
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise OptionError(f'--seeds {text} is neither a number, such as 5, nor seeds, such as 0-2 or 3,7.')
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(seeds)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError as error:
        raise OptionError(f'--lr-factors {text} are no numbers, such as 0.3,1,3.') from error


def _parameters() -> list[inspect.Parameter]:
    own = parameters_of(CompareOptions, {}, _LISTS, _TEXTS)
    recipe = parameters_of(
        FinetuneOptions,
        {},
        ('model_options',),
        helps=_HELPS,
        without=[name for name in FinetuneOptions.__dataclass_fields__ if name not in (*RECIPE, *OF_MACHINES)],
    )
    text = Annotated[bool, typer.Option('--json', help='Print JSON.', rich_help_panel='Runs')]
    return [*recipe[:1], *own, *recipe[1:], keyword('as_json', False, text)]


give_parameters(command, _parameters())
