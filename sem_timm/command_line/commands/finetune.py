"""``sem-timm finetune``: training from the command line; its options are the fields of `FinetuneOptions`."""

from __future__ import annotations

import inspect
import json
import os
from typing import Annotated, Any

import torch
import typer

from sem_timm.command_line.fields import flag_of, give_parameters, keyword, parameters_of
from sem_timm.command_line.values import parse_target
from sem_timm.finetuning import FinetuneOptions, FinetuneResult, finetune
from sem_timm.finetuning.baseline import finetune_without, options_without
from sem_timm.finetuning.calls import options_of_run
from sem_timm.finetuning.options import BUILT_IN, NO_OPERATION
from sem_timm.typed_values import parse_pairs

_NAMES = {'operation_options': '--set'}
_PAIRS = ('model_options', 'operation_options')
_TARGETS = ('target', 'exclude')


def command(compare: bool | None, as_json: bool, **values: Any) -> None:
    """Train a model with an operation put into it, and print what was gained.

    Without any argument: a small ResNet with SEM learns scikit-learn's handwritten digits, in about a minute. Ctrl-C
    saves and stops; `--resume` continues exactly. `torchrun --nproc-per-node 2 -m sem_timm finetune ...` and
    `accelerate launch` train on several GPUs.

    Examples: `sem-timm finetune`, `sem-timm finetune resnet50 --data photos/ --train new --new-lr-scale 10`,
    `sem-timm finetune vit_small_patch16_224 --operation external --set memory=32 --data hfds/beans --layer-decay 0.7`,
    `sem-timm finetune --resume runs/my-run`.
    """
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    for name in {*_PAIRS} & {*typed}:
        typed[name] = parse_pairs(typed[name], flag_of(name, _NAMES))
    for name in {*_TARGETS} & {*typed}:
        typed[name] = parse_target(typed[name])
    if 'trackers' in typed:
        typed['trackers'] = tuple(typed['trackers'])
    asked = options_of_run(**typed)
    if compare is None:
        compare = asked.data == BUILT_IN and asked.operation != NO_OPERATION
    if compare:
        options_without(asked)  # so that an error comes before the training
    result, without = finetune(**typed), None
    try:
        without = finetune_without(result) if compare else None
    finally:  # what was trained is told, however the comparison ends
        if int(os.environ.get('RANK', 0)) == 0:
            print(_as_json(result, without) if as_json else _as_text(result, without))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _as_json(result: FinetuneResult, without: FinetuneResult | None) -> str:
    return json.dumps({**result.to_dict(), 'without_operation': without and without.to_dict()}, indent=1)


def _as_text(result: FinetuneResult, without: FinetuneResult | None) -> str:
    number = result.num_images[1]
    gained = round((result.after - result.before) * number)
    lines = [
        f'{result.options.model} with {result.operation}: accuracy {result.before:.2%} before, '
        f'{result.after:.2%} after {result.num_steps:,} steps: {gained:+,} of {number:,} images read right.'
    ]
    if without is not None:
        difference = round((result.after - without.after) * number)
        lines += [
            f'The same recipe without {result.operation}: {without.after:.2%} '
            f'({result.num_new_parameters:,} parameters fewer). '
            f'With {result.operation}: {difference:+,} images. One seed shows no more than that it trains.'
        ]
    if result.bad_images:
        more = ', ...' if len(result.bad_images) > 1 else ''
        lines.append(
            f'Images that could not be read, and were skipped: {len(result.bad_images)}: {result.bad_images[0]}{more}'
        )
    lines.append(f'{result.seconds:.0f} s. Weights, logs and checkpoints: {result.folder}')
    return '\n'.join(lines)


def _parameters() -> list[inspect.Parameter]:
    """The parameters that typer makes the command line from."""
    made = parameters_of(FinetuneOptions, _NAMES, (*_PAIRS, *_TARGETS, 'trackers'))
    text = 'Train once more without the operation and compare. By default for the built-in digits.'
    own = {
        'compare': (None, Annotated[bool | None, typer.Option(help=text, rich_help_panel='Run')]),
        'as_json': (False, Annotated[bool, typer.Option('--json', help='Print JSON.', rich_help_panel='Run')]),
    }
    return made + [keyword(name, default, annotation) for name, (default, annotation) in own.items()]


give_parameters(command, _parameters())
