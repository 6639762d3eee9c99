"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from sem_timm.command_line.values import complete_model, complete_operation
from sem_timm.errors import OptionError, closest
from sem_timm.layers import attention_names

Targets: TypeAlias = Annotated[
    list[str] | None, typer.Option(help='Where: a regular expression over module names, or repeated, exact names.')
]
Excluded: TypeAlias = Annotated[list[str] | None, typer.Option(help='Where not, by the same rules.')]
OperationOptions: TypeAlias = Annotated[
    list[str] | None, typer.Option('--set', help='Option key=value of the operation; repeatable.')
]
ModelName: TypeAlias = Annotated[str, typer.Argument(help='Name of a timm model.', autocompletion=complete_model)]
ModelOptions: TypeAlias = Annotated[
    list[str] | None, typer.Option('--model-options', help='Argument key=value of the model; repeatable.')
]
ImageSize: TypeAlias = Annotated[int | None, typer.Option(help='Height and width of the input in pixels.', min=1)]
RunFolder: TypeAlias = Annotated[Path, typer.Argument(help='Folder of a run of sem-timm finetune.')]
OtherImages: TypeAlias = Annotated[str | None, typer.Option(help='Other images than those of the run, named as there.')]
MaxBatches: TypeAlias = Annotated[int | None, typer.Option(help='Look at so many batches at most.', min=1)]
AsJson: TypeAlias = Annotated[bool, typer.Option('--json', help='Print JSON.')]
NewAttention: TypeAlias = Annotated[
    str,
    typer.Option('--operation', '-o', help='The operation: which attention is new.', autocompletion=complete_operation),
]


def check_attention(operation: str) -> None:
    """Raises OptionError if an operation is no attention; the message names the closest ones."""
    if operation not in attention_names():
        raise OptionError(f'operation {operation!r} is no attention. {closest(operation, attention_names())}')
