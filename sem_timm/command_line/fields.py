"""Options of a command from the fields of a dataclass, whose metadata say what they mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from sem_timm.command_line.values import complete_model, complete_operation

_COMPLETIONS = {'model': complete_model, 'operation': complete_operation}
_SHORT = {'operation': ('-o',)}


def parameters_of(
    cls: Any,
    flags: Mapping[str, str],
    lists: Collection[str],
    texts: Collection[str] = (),
    without: Collection[str] = (),
    helps: Mapping[str, str] | None = None,
) -> list[inspect.Parameter]:
    """The parameters that typer makes options from, one for each field.

    None has a default of its own, so that what was typed can be told from what was not. A field ``model`` is the
    argument of the command.

    Args:
        cls: The dataclass.
        flags: Names of options that are not those of their fields.
        lists: Fields whose option is repeatable.
        texts: Fields whose option is a text that the command reads itself.
        without: Fields that get no option.
        helps: Texts for fields that mean something else to this command, with their defaults.
    """
    hints = get_type_hints(cls)
    kinds: dict[str, Any] = {**dict.fromkeys(lists, list[str]), **dict.fromkeys(texts, str)}
    told = {f.name: f.metadata['help'] for f in fields(cls)} | dict(helps or {})
    return [
        _parameter(
            f.name,
            default=None if f.name in (helps or {}) else f.default,
            hint=kinds.get(f.name, hints[f.name]),
            metadata={**f.metadata, 'help': told[f.name]},
            flag=flag_of(f.name, flags),
        )
        for f in fields(cls)
        if f.name not in without
    ]


def flag_of(name: str, flags: Mapping[str, str]) -> str:
    """The option of a field, as it is typed."""
    return flags.get(name, '--' + name.replace('_', '-'))


def _parameter(name: str, default: Any, hint: Any, metadata: Any, flag: str) -> inspect.Parameter:
    text, panel = metadata['help'], metadata['panel']
    shown = ', '.join(map(str, default)) if isinstance(default, tuple) else default
    shown = True if isinstance(shown, bool) or shown in (None, '') else str(shown)
    completion = _COMPLETIONS.get(name)
    if name == 'model':
        info: Any = typer.Argument(help=text, autocompletion=completion, show_default=shown)
        return keyword(name, None, Annotated[str | None, info])
    if hint in (bool, bool | None):
        flag = f'{flag}/--no-{flag[2:]}'
    flags = (flag, *_SHORT.get(name, ()))
    info = typer.Option(*flags, help=text, rich_help_panel=panel, autocompletion=completion, show_default=shown)
    return keyword(name, None, Annotated[hint | None, info])


def keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    """A parameter that typer makes an option from."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def give_parameters(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Gives a function the signature that typer reads."""
    vars(command)['__signature__'] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
