"""``sem-timm finetune``: training from the command line; its options are the fields of `FinetuneOptions`."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import torch
import typer

from sem_timm.command_line.values import complete_model, complete_operation, parse_pairs, parse_target
from sem_timm.finetuning import FinetuneOptions, FinetuneResult, finetune
from sem_timm.finetuning.baseline import finetune_without, options_without
from sem_timm.finetuning.calls import options_of_run
from sem_timm.finetuning.options import BUILT_IN, NO_OPERATION

_NAMES = {'operation_options': '--set'}
_PAIRS = ('model_options', 'operation_options')
_TARGETS = ('target', 'exclude')


def command(compare: bool | None, as_json: bool, **values: Any) -> None:
    """Train a model with an operation put into it, and print what was gained.

    Without any argument: a small ResNet with SEM learns scikit-learn's handwritten digits, in about a minute. Ctrl-C
    saves and stops; `--resume` continues exactly. `torchrun --nproc-per-node 2 -m sem_timm finetune ...` and
    `accelerate launch` train on several GPUs.

    Examples: `sem-timm finetune`, `sem-timm finetune resnet50 --data photos/ --freeze-base --new-lr-scale 10`,
    `sem-timm finetune vit_small_patch16_224 --operation external --set memory=32 --data hfds/beans --layer-decay 0.7`,
    `sem-timm finetune --resume runs/my-run`.
    """
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    for name in {*_PAIRS} & {*typed}:
        typed[name] = parse_pairs(typed[name], _flag(name))
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


def _flag(name: str) -> str:
    return _NAMES.get(name, '--' + name.replace('_', '-'))


def _parameters() -> list[inspect.Parameter]:
    """The parameters that typer makes the command line from."""
    hints = get_type_hints(FinetuneOptions)
    made = [
        _parameter(field.name, field.default, hints[field.name], field.metadata) for field in fields(FinetuneOptions)
    ]
    text = 'Train once more without the operation and compare. By default for the built-in digits.'
    own = {
        'compare': (None, Annotated[bool | None, typer.Option(help=text, rich_help_panel='Run')]),
        'as_json': (False, Annotated[bool, typer.Option('--json', help='Print JSON.', rich_help_panel='Run')]),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    return made + [inspect.Parameter(n, kind, default=d, annotation=a) for n, (d, a) in own.items()]


def _parameter(name: str, default: Any, hint: Any, metadata: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    text, panel = metadata['help'], metadata['panel']
    # Without a default of their own, so that what was typed can be told from what was not.
    shown = ', '.join(default) if isinstance(default, tuple) else default
    shown = True if isinstance(shown, bool) or shown in (None, '') else str(shown)
    if name == 'model':
        info: Any = typer.Argument(help=text, autocompletion=complete_model, show_default=shown)
        return inspect.Parameter(name, kind, default=None, annotation=Annotated[str | None, info])
    completion = complete_operation if name == 'operation' else None
    flag = _flag(name)
    if hint in (bool, bool | None):
        flag = f'{flag}/--no-{flag[2:]}'
    info = typer.Option(flag, help=text, rich_help_panel=panel, autocompletion=completion, show_default=shown)
    hint = list[str] if name in (*_PAIRS, *_TARGETS, 'trackers') else hint
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[hint | None, info])


_made = _parameters()
vars(command)['__signature__'] = inspect.Signature(_made)
command.__annotations__ = {parameter.name: parameter.annotation for parameter in _made}
