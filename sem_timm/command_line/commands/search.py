"""``sem-timm search``: which blocks of a trained model can do with another attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sem_timm.attention_search import search
from sem_timm.command_line.arguments import AsJson, Excluded, NewAttention, OperationOptions, Targets, check_attention
from sem_timm.command_line.values import parse_target
from sem_timm.finetuning.runs import open_run
from sem_timm.reports.pictures import check_path
from sem_timm.typed_values import parse_pairs


def command(
    run: Annotated[Path, typer.Argument(help='Folder of a run of sem-timm finetune with self-attention.')],
    operation: NewAttention = 'external',
    tolerance: Annotated[float, typer.Option(help='Part of the agreement with the original that may be lost.')] = 0.01,
    max_batches: Annotated[int, typer.Option(help='Look at so many batches of training images at most.', min=1)] = 4,
    target: Targets = None,
    exclude: Excluded = None,
    options: OperationOptions = None,
    plot: Annotated[Path | None, typer.Option(help='Draw the front there, a .png, .svg or .pdf.')] = None,
    as_json: AsJson = False,
) -> None:
    """Find the blocks of a trained model that can do with another attention, by forward passes alone.

    Looks at training images, so that results on the others stay honest.

    Examples: `sem-timm finetune test_vit --operation none --output run`, then
    `sem-timm search run --set memory=32 --set own=true --tolerance 0.02 --plot front.png`.
    """
    check_attention(operation)
    if plot is not None:
        check_path(plot)
    opened = open_run(run)
    found = search(
        opened.model,
        operation,
        opened.training,
        tolerance=tolerance,
        max_batches=max_batches,
        target=parse_target(target),
        exclude=parse_target(exclude),
        input_size=opened.input_size,
        **parse_pairs(options, '--set'),
    )
    if plot is not None:
        found.plot(plot)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)
