"""``sem-timm explain``: why one module takes an operation, or why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sem_timm.command_line.arguments import AsJson, ImageSize, ModelName, ModelOptions, OperationOptions
from sem_timm.command_line.networks import open_network
from sem_timm.command_line.values import complete_operation
from sem_timm.reports import explain
from sem_timm.typed_values import parse_pairs


def command(
    model: ModelName,
    module: Annotated[str, typer.Argument(help='Name of a module in it, such as layer3.0.')],
    operation: Annotated[
        str, typer.Option('--operation', '-o', help='What to put in.', autocompletion=complete_operation)
    ] = 'sem',
    options: OperationOptions = None,
    model_options: ModelOptions = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Show why one module takes an operation, or why not: its forward as it was read, what was found, who decided.

    Needs no weights: nothing is downloaded or computed.

    Examples: `sem-timm explain resnet50 layer3.0`, `sem-timm explain cait_xxs24_224 blocks.0.attn -o external`.
    """
    network, size = open_network(model, model_options, image_size)
    explanation = explain(network, module, operation, input_size=size, **parse_pairs(options, '--set'))
    print(json.dumps(explanation.to_dict(), indent=1) if as_json else explanation)
