"""``sem-timm explain``: why one module takes an operation, or why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sem_timm.command_line.arguments import OperationOptions
from sem_timm.command_line.networks import create_on_meta
from sem_timm.command_line.values import complete_model, complete_operation
from sem_timm.finetuning.models import input_size, model_arguments
from sem_timm.reports import explain
from sem_timm.typed_values import parse_pairs


def command(
    model: Annotated[str, typer.Argument(help='Name of a timm model.', autocompletion=complete_model)],
    module: Annotated[str, typer.Argument(help='Name of a module in it, such as layer3.0.')],
    operation: Annotated[
        str, typer.Option('--operation', '-o', help='What to put in.', autocompletion=complete_operation)
    ] = 'sem',
    options: OperationOptions = None,
    model_options: Annotated[
        list[str] | None, typer.Option('--model-options', help='Argument key=value of the model; repeatable.')
    ] = None,
    image_size: Annotated[int | None, typer.Option(help='Height and width of the input in pixels.', min=1)] = None,
    as_json: Annotated[bool, typer.Option('--json', help='Print JSON.')] = False,
) -> None:
    """Show why one module takes an operation, or why not: its forward as it was read, what was found, who decided.

    Needs no weights: nothing is downloaded or computed.

    Examples: `sem-timm explain resnet50 layer3.0`, `sem-timm explain cait_xxs24_224 blocks.0.attn -o external`.
    """
    arguments = model_arguments(model, parse_pairs(model_options, '--model-options'), image_size)
    network = create_on_meta(model, arguments)
    size = input_size(network, arguments, image_size) if image_size else None
    explanation = explain(network, module, operation, input_size=size, **parse_pairs(options, '--set'))
    print(json.dumps(explanation.to_dict(), indent=1) if as_json else explanation)
