"""``sem-timm plan``: what an operation would do to a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sem_timm.command_line.arguments import (
    AsJson,
    Excluded,
    ImageSize,
    ModelName,
    ModelOptions,
    OperationOptions,
    Targets,
)
from sem_timm.command_line.networks import open_network
from sem_timm.command_line.values import complete_operation, parse_target
from sem_timm.operations import plan_model
from sem_timm.typed_values import parse_pairs


def command(
    model: ModelName,
    operation: Annotated[
        str,
        typer.Option(
            '--operation',
            '-o',
            help='What to put in: a name of `sem-timm list --operations`.',
            autocompletion=complete_operation,
        ),
    ] = 'sem',
    target: Targets = None,
    exclude: Excluded = None,
    options: OperationOptions = None,
    model_options: ModelOptions = None,
    image_size: ImageSize = None,
    code: Annotated[str | None, typer.Option(metavar='SITE', help='Print the new forward of a site instead.')] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an operation would do to a model: sites, new parameters, and what is refused and why.

    Needs no weights: nothing is downloaded or computed.

    Examples: `sem-timm plan resnet50`, `sem-timm plan vit_small_patch16_224 -o external --set memory=32`,
    `sem-timm plan resnet50 --target 'layer[34].*' --code layer3.0`.
    """
    network, size = open_network(model, model_options, image_size)
    plan = plan_model(
        network,
        operation,
        target=parse_target(target),
        exclude=parse_target(exclude),
        input_size=size,
        **parse_pairs(options, '--set'),
    )
    if code is not None:
        print(plan.code(code).rstrip())
    else:
        print(json.dumps(plan.to_dict(), indent=1) if as_json else plan)
