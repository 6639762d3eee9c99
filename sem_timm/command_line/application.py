"""The application: every module of `sem_timm.command_line.commands` is a command of its name."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import typer

from sem_timm.command_line import commands

_HELP = """Better attention in any timm model: plan it, train it, look at it.

Examples: `sem-timm plan resnet50`, `sem-timm finetune`, `sem-timm finetune resnet50 --data photos/ --train new`.
"""


def create_application() -> typer.Typer:
    """Collects the commands; each module has a function ``command``, whose docstring is the help text."""
    application = typer.Typer(
        help=_HELP, no_args_is_help=True, rich_markup_mode='markdown', pretty_exceptions_enable=False
    )
    for module in pkgutil.iter_modules(commands.__path__):
        command = import_module(f'{commands.__name__}.{module.name}').command
        application.command(module.name)(command)
    return application
