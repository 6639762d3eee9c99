"""``sem-timm transfer``: another attention in a trained model, and its skill back."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from safetensors.torch import save_model

from sem_timm.attention_transfer import TransferOptions, transfer
from sem_timm.attention_transfer.processes import Share, is_main
from sem_timm.command_line.arguments import AsJson, Excluded, NewAttention, OperationOptions, Targets, check_attention
from sem_timm.command_line.values import parse_target
from sem_timm.errors import OptionError, SwapWarning, closest
from sem_timm.finetuning.files import OPTIONS, PATCH, WEIGHTS, explained, write_text, write_whole
from sem_timm.finetuning.runs import Run, open_run
from sem_timm.operations import AttentionConfig, patch_model
from sem_timm.persistence import save_patch
from sem_timm.registry import base_architecture
from sem_timm.surgery import patched_modules
from sem_timm.typed_values import parse_pairs


def command(
    run: Annotated[Path, typer.Argument(help='Folder of a run of sem-timm finetune with self-attention.')],
    operation: NewAttention = 'external',
    target: Targets = None,
    exclude: Excluded = None,
    options: OperationOptions = None,
    transfer_options: Annotated[
        list[str] | None,
        typer.Option('--transfer', help='Option key=value of the transfer, such as train=module; repeatable.'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help='New folder for the weights, and for the patch file.')] = None,
    as_json: AsJson = False,
) -> None:
    """Swap the attention of a trained model and give it its skill back, with its own training images as examples.

    Under `accelerate launch` the processes share the images. Options of the transfer, among them `stages`, `train`,
    `epochs` and `learning_rate`, are those of `sem_timm.TransferOptions`.

    Examples: `sem-timm finetune test_vit --operation none --output run`, then
    `sem-timm transfer run --set memory=32 --transfer epochs=5 --transfer train=module --output swapped`.
    """
    how = _transfer_options(transfer_options)
    check_attention(operation)
    if output is not None and output.exists():
        raise OptionError(f'--output {output} exists; name a new folder.')
    opened = open_run(run)
    _check_not_swapped(run, opened)
    if output is not None:
        _check_not_patched(run, opened)
    chosen = parse_pairs(options, '--set')
    places: dict[str, Any] = {'target': parse_target(target), 'exclude': parse_target(exclude)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)  # it is about to be trained
        patch_model(opened.model, operation, input_size=opened.input_size, **places, **chosen)
    try:
        result = transfer(opened.model, Share(opened.training), how, evaluation=Share(opened.validation))
        first = is_main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if not first:
        return
    if output is not None:
        with explained(output):
            output.mkdir(parents=True)
        told = replace(opened.options, operation=operation, operation_options=chosen, output=str(output), **places)
        write_text(output / OPTIONS, told.to_json())
        write_whole(output / WEIGHTS, lambda path: save_model(opened.model, str(path)))
        if how.train == 'new' and how.distill_train in (None, 'new'):  # else the base has changed with it
            save_patch(opened.model, output / PATCH)
    print(json.dumps(result.to_dict(), indent=1) if as_json else result)
    if output is not None and not as_json:
        print(f'Weights, as those of a run: {output}')


def _check_not_swapped(run: Path, opened: Run) -> None:
    here = next((part for part in patched_modules(opened.model) if isinstance(part.operation, AttentionConfig)), None)
    if here is not None:
        own = opened.options
        name = base_architecture(timm.models.split_model_name_tag(own.model)[0])
        raise OptionError(
            f'{run} has {here.operation} in place of self-attention already, so that there is no original to learn '
            f'from. Train one first: sem-timm finetune {name} --operation none --data {own.data} --output FOLDER'
        )


def _check_not_patched(run: Path, opened: Run) -> None:
    here = next(iter(patched_modules(opened.model)), None)
    if here is not None:
        raise OptionError(
            f'{run} has {here.operation} already, and the options of a run, which --output would write, name one '
            'operation. Leave --output; or transfer in Python, with open_run, patch_model, transfer and save_patch.'
        )


def _transfer_options(pairs: list[str] | None) -> TransferOptions:
    values = parse_pairs(pairs, '--transfer')
    for name in ('stages', 'sharpness'):
        if name in values and not isinstance(values[name], tuple):
            values[name] = (values[name],)
    known = [field.name for field in fields(TransferOptions)]
    for name in values:
        if name not in known:
            raise OptionError(f'--transfer: option {name!r} is unknown. {closest(name, known)}')
    return TransferOptions(**values)
