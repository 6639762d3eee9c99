"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Targets: TypeAlias = Annotated[
    list[str] | None, typer.Option(help='Where: a regular expression over module names, or repeated, exact names.')
]
OperationOptions: TypeAlias = Annotated[
    list[str] | None, typer.Option('--set', help='Option key=value of the operation; repeatable.')
]
