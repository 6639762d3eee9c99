"""Gives every patched architecture of timm images of other sizes, and compares with what its base takes.

    python -m benchmarks.image_sizes                  # all of it; goes on where it was stopped
    python -m benchmarks.image_sizes resnet50 'vit_*' # some of it, printed

From the folder of the repository. On the meta device, so weights and a GPU are not needed: which inputs are taken, and
the shape of what comes out, do not depend on numbers. Six sizes, most of them not square, and batches of one and three;
the result is a column of docs/zoo.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

import sem_timm
from benchmarks.common.meta import create_on_meta, own_architectures
from benchmarks.common.run_log import continued, read_log
from benchmarks.zoo import VERSIONS, write_page
from sem_timm.meta import LayoutMode
from sem_timm.surgery.cases import has_cases

LOG = Path('build/image_sizes.jsonl')
DOCUMENT = Path('docs/zoo_sizes.json')
OPERATIONS = ('sem', 'external')


@dataclass
class Sizes:
    """What one architecture takes.

    Attributes:
        architecture: Its name.
        taken: How many of the inputs the base takes, by operation.
        refused: Those of them that the patched model does not take, with the error, by operation.
        versions: Of sem_timm, timm and torch.
    """

    architecture: str
    taken: dict[str, int] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: VERSIONS)


def inputs_for(model: nn.Module, thorough: bool) -> list[tuple[int, ...]]:
    """Shapes of batches: the model's own size and five others, in batches of one or three, or of both."""
    channels, side, _ = model.pretrained_cfg.get('input_size', (3, 224, 224))  # type: ignore[union-attr]
    own = (side, side), (side, side + 64), (side + 32, side - 32), (128, 192), (side + 3, side - 5), (2 * side, side)
    sizes = [size for size in own if min(size) > 0]
    batches = [(1, 3)] * len(sizes) if thorough else [(1,), (3,)] * 3
    return [(batch, channels, *size) for size, of_size in zip(sizes, batches) for batch in of_size]


def look_at(architecture: str) -> Sizes:
    """What an architecture takes, as it is and with each operation."""
    found = Sizes(architecture)
    base = create_on_meta(architecture).eval()
    known: dict[tuple[int, ...], Any] = {}
    for operation in OPERATIONS:
        model = create_on_meta(architecture).eval()
        try:
            plan = sem_timm.plan_model(model, operation)
        except sem_timm.RefusedError:
            continue
        sem_timm.patch_model(model, plan)
        shapes = inputs_for(base, any(map(has_cases, plan.edits.values())))
        for shape in shapes:
            if shape not in known:
                known[shape] = run(base, shape)
        taken = [shape for shape in shapes if not isinstance(known[shape], str)]
        found.taken[operation] = len(taken)
        got = {shape: run(model, shape) for shape in taken}
        refused = [f'{shape}: {output}' for shape, output in got.items() if output != known[shape]]
        if refused:
            found.refused[operation] = refused
    return found


def run(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """Shapes of what a model makes of a batch, or the error as text."""
    try:
        with torch.no_grad(), LayoutMode():  # which finds most shapes without torch, six times as fast
            output = model(torch.empty(shape, device='meta'))
    except Exception as error:  # the models are anybody's; what they refuse is what is asked here
        return f'{type(error).__name__}: {str(error)[:200]}'
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return [tuple(each.shape) for each in outputs]


def sweep(names: list[str], log: Path) -> Iterator[Sizes]:
    """Of all architectures; what an earlier run with the same versions left in the log is not done again."""
    logged = [Sizes(**record) for record in read_log(log) if record['versions'] == VERSIONS]
    return continued(names, {row.architecture: row for row in logged}, look_at, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('patterns', nargs='*', help='names, with wildcards; all architectures by default')
    parser.add_argument('--log', type=Path, default=LOG, help='a line for each architecture that is done')
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n in own_architectures() if not args.patterns or any(fnmatch.fnmatch(n, p) for p in args.patterns)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rows = list(track(sweep(names, args.log), total=len(names)))
    for row in rows:
        for operation, refused in row.refused.items():
            print(row.architecture, operation, *refused, sep='\n  ')
    for operation in OPERATIONS:
        taken = sum(row.taken.get(operation, 0) for row in rows)
        print(f'{operation}: {taken - sum(len(row.refused.get(operation, ())) for row in rows)} of {taken}')
    if not args.patterns:
        rows.sort(key=lambda row: row.architecture)
        lines = ',\n'.join(json.dumps(asdict(row)) for row in rows)
        DOCUMENT.write_text(f'[\n{lines}\n]\n')
        write_page()


if __name__ == '__main__':
    main()
