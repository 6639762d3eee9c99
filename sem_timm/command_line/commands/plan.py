"""``sem-timm plan``: what an operation would do to a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sem_timm.command_line.arguments import OperationOptions, Targets
from sem_timm.command_line.networks import create_on_meta
from sem_timm.command_line.values import complete_model, complete_operation, parse_target
from sem_timm.finetuning.models import input_size, model_arguments
from sem_timm.operations import plan_model
from sem_timm.typed_values import parse_pairs


def command(
    model: Annotated[str, typer.Argument(help='Name of a timm model.', autocompletion=complete_model)],
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
    exclude: Annotated[list[str] | None, typer.Option(help='Where not, by the same rules.')] = None,
    options: OperationOptions = None,
    model_options: Annotated[
        list[str] | None, typer.Option('--model-options', help='Argument key=value of the model; repeatable.')
    ] = None,
    image_size: Annotated[int | None, typer.Option(help='Height and width of the input in pixels.', min=1)] = None,
    code: Annotated[str | None, typer.Option(metavar='SITE', help='Print the new forward of a site instead.')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='Print JSON.')] = False,
) -> None:
    """Show what an operation would do to a model: sites, new parameters, and what is refused and why.

    Needs no weights: nothing is downloaded or computed.

    Examples: `sem-timm plan resnet50`, `sem-timm plan vit_small_patch16_224 -o external --set memory=32`,
    `sem-timm plan resnet50 --target 'layer[34].*' --code layer3.0`.
    """
    arguments = model_arguments(model, parse_pairs(model_options, '--model-options'), image_size)
    network = create_on_meta(model, arguments)
    plan = plan_model(
        network,
        operation,
        target=parse_target(target),
        exclude=parse_target(exclude),
        input_size=input_size(network, arguments, image_size) if image_size else None,
        **parse_pairs(options, '--set'),
    )
    if code is not None:
        print(plan.code(code).rstrip())
    else:
        print(json.dumps(plan.to_dict(), indent=1) if as_json else plan)
