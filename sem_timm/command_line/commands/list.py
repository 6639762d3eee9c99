"""``sem-timm list``: which models there are, and what can be done to them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import timm
import typer
from rich.console import Console
from rich.table import Table

from sem_timm.command_line.arguments import AsJson
from sem_timm.errors import NoMatchError, closest
from sem_timm.operations import operation_names
from sem_timm.registry import DEFAULT_OPERATIONS
from sem_timm.registry.table import read_table
from sem_timm.registry.variant_operation import VariantOperation

# Of the variants that importing the package registers.
_SUFFIXES = tuple(VariantOperation(name).suffix for name in DEFAULT_OPERATIONS)


def command(
    pattern: Annotated[str, typer.Argument(metavar='[FILTER]', help='A part of a name, or a pattern with *.')] = '',
    pretrained: Annotated[bool, typer.Option('--pretrained', help='Only models with pretrained weights.')] = False,
    operations: Annotated[bool, typer.Option('--operations', help='List the operations instead.')] = False,
    as_json: AsJson = False,
) -> None:
    """List models, with the places in them where attention can be replaced.

    Every model takes the operation sem: `sem-timm finetune resnet50`, or by name, `resnet50_sem`.

    Examples: `sem-timm list resnet`, `sem-timm list 'vit_*_224' --pretrained`, `sem-timm list --operations`.
    """
    if operations:
        names = operation_names()
        print(json.dumps(names) if as_json else '\n'.join(names))
        return
    rows = _rows(pattern, pretrained)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    for title in ('model', 'pretrained weights', 'variants', 'attention sites'):
        table.add_column(title, overflow='fold')
    for row in rows:
        variants, tags = ', '.join(row['variants']), ', '.join(row['pretrained'])
        table.add_row(str(row['model']), tags, variants, str(row['attention_sites'] or ''))
    Console().print(table)
    print(f'{len(rows)} models')


def _rows(pattern: str, pretrained: bool) -> list[dict[str, Any]]:
    table, external = read_table(), VariantOperation('external')
    bases = [name for name in timm.list_models() if not name.endswith(_SUFFIXES)]
    wanted = pattern if '*' in pattern or '?' in pattern else f'*{pattern}*'
    everything = set(timm.list_models())
    found = {*timm.list_models(wanted)} & {*bases}
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        base, _, tag = name.partition('.')
        tags.setdefault(base, []).append(tag or 'untagged')
    names = [name for name in bases if name in found and (not pretrained or name in tags)]
    if not names:
        raise NoMatchError(f'no model is called like {pattern!r}. {closest(pattern.strip("*"), bases)}')
    return [
        {
            'model': name,
            'pretrained': tags.get(name, []),
            'variants': [name + end for end in _SUFFIXES if name + end in everything],
            'attention_sites': table.count(name, external) or 0,
        }
        for name in names
    ]
