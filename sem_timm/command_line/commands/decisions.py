"""``sem-timm decisions``: which excitation each block of a trained model chooses."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sem_timm.command_line.arguments import AsJson, MaxBatches, OtherImages, RunFolder
from sem_timm.finetuning.runs import open_run
from sem_timm.reports import decisions


def command(
    run: RunFolder,
    data: OtherImages = None,
    by_class: Annotated[bool, typer.Option('--by-class', help='The decisions for each class too.')] = False,
    max_batches: MaxBatches = None,
    plot: Annotated[Path | None, typer.Option(help='Draw a heatmap there, a .png, .svg or .pdf.')] = None,
    as_json: AsJson = False,
) -> None:
    """Show which excitation each block of a trained model with SEM chooses, over its validation images.

    Examples: `sem-timm finetune --output run` and then `sem-timm decisions run --plot decisions.png`.
    """
    opened = open_run(run, data=data)
    found = decisions(opened.model, opened.validation, by_class=by_class, max_batches=max_batches)
    names: dict[Hashable, Hashable] = dict(enumerate(opened.classes))
    if len({*names.values()}) == len(names):
        found = replace(found, classes={names.get(label, label): one for label, one in found.classes.items()})
    if plot is not None:
        found.plot(plot)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)
