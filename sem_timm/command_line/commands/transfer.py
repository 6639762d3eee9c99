"""``sem-timm transfer``: another attention in a trained model, and its skill back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_model

from sem_timm.attention_transfer import TransferOptions, transfer
from sem_timm.command_line.values import complete_operation, parse_pairs, parse_target
from sem_timm.errors import OptionError, SwapWarning
from sem_timm.finetuning.files import explained, write_whole
from sem_timm.finetuning.runs import open_run
from sem_timm.operations import patch_model
from sem_timm.persistence import save_patch


def command(
    run: Annotated[Path, typer.Argument(help='Folder of a run of sem-timm finetune with self-attention.')],
    operation: Annotated[
        str, typer.Option('--operation', '-o', help='The new attention.', autocompletion=complete_operation)
    ] = 'external',
    target: Annotated[
        list[str] | None, typer.Option(help='Where: a regular expression over module names, or repeated, exact names.')
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option('--set', help='Option key=value of the operation; repeatable.')
    ] = None,
    transfer_options: Annotated[
        list[str] | None,
        typer.Option('--transfer', help='Option key=value of the transfer, such as train=module; repeatable.'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help='New folder for the weights, and for the patch file.')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='Print JSON.')] = False,
) -> None:
    """Swap the attention of a trained model and give it its skill back, with its own training images as examples.

    Options of the transfer, among them `stages`, `train`, `epochs` and `learning_rate`, are those of
    `sem_timm.TransferOptions`.

    Examples: `sem-timm finetune test_vit --operation none --output run`, then
    `sem-timm transfer run --set memory=32 --transfer epochs=5 --transfer train=module --output swapped`.
    """
    how = _transfer_options(transfer_options)
    if output is not None and output.exists():
        raise OptionError(f'--output {output} exists; name a new folder.')
    opened = open_run(run)
    names = parse_target(target)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SwapWarning)  # it is about to be trained
        patch_model(
            opened.model,
            operation,
            target=list(names) if isinstance(names, tuple) else names,
            input_size=opened.input_size,
            **parse_pairs(options, '--set'),
        )
    result = transfer(opened.model, opened.training, how, evaluation=opened.validation)
    if output is not None:
        with explained(output):
            output.mkdir(parents=True)
        write_whole(output / 'model.safetensors', lambda path: save_model(opened.model, str(path)))
        if how.train == 'new' and how.distill_train in (None, 'new'):  # else the base has changed with it
            save_patch(opened.model, output / 'patch')
    print(json.dumps(result.to_dict(), indent=1) if as_json else result)


def _transfer_options(pairs: list[str] | None) -> TransferOptions:
    values = parse_pairs(pairs, '--transfer')
    for name in ('stages', 'sharpness'):
        if name in values and not isinstance(values[name], tuple):
            values[name] = (values[name],)
    try:
        return TransferOptions(**values)
    except TypeError as error:
        raise OptionError(f'--transfer: {error}; its keys are the fields of sem_timm.TransferOptions.') from error
