"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from sem_timm.command_line.values import complete_operation
from sem_timm.errors import OptionError, closest
from sem_timm.layers import attention_names

Targets: TypeAlias = Annotated[
    list[str] | None, typer.Option(help='Where: a regular expression over module names, or repeated, exact names.')
]
OperationOptions: TypeAlias = Annotated[
    list[str] | None, typer.Option('--set', help='Option key=value of the operation; repeatable.')
]
NewAttention: TypeAlias = Annotated[
    str,
    typer.Option('--operation', '-o', help='The operation: which attention is new.', autocompletion=complete_operation),
]


def check_attention(operation: str) -> None:
    """Raises OptionError if an operation is no attention; the message names the closest ones."""
    if operation not in attention_names():
        raise OptionError(f'operation {operation!r} is no attention. {closest(operation, attention_names())}')
