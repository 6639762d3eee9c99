"""The same ViT-S on larger and larger images, with its own attention and with others: time and memory of the model.

    python benchmarks/attention_sizes.py --log docs/attention_sizes.jsonl
    python benchmarks/attention_sizes.py --log docs/attention_sizes.jsonl --device cuda  # bfloat16: flash attention
    python benchmarks/attention_sizes.py --log docs/attention_sizes.jsonl --page docs/attention_sizes.md

A model of the form of DINOv2-S/14, batch 1, eager, one thread of a CPU in float32; all kinds take turns. One row of
JSON per size and step, so that a run that was stopped goes on where it was. The page is made of the rows, without
running anything.
"""

from __future__ import annotations

import argparse
import datetime
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.benchmark import Timer

import sem_timm
from attention_models import forward, training_step
from common.measuring import Times, keep_freed_memory, machine, peak_mib
from common.run_log import append_record, is_logged, read_log

NAME, PATCH = 'vit_small_patch14_dinov2', 14
ORIGINAL = 'original'
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    'external': ('external', {}),
    'linear': ('linear', {}),
    'efficient': ('efficient', {}),
    'monarch': ('monarch', {}),
    'linear, own, local': ('linear', {'own': True, 'local': True}),
}
SIZES = (224, 448, 896)
STEPS: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {'forward': forward, 'training step': training_step}


def models(size: int, device: str) -> dict[str, nn.Module]:
    """The original and the swapped models for images of a size."""
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    found: dict[str, nn.Module] = {}
    for name in (ORIGINAL, *KINDS):
        model = timm.create_model(NAME, img_size=size, num_classes=10)
        if name != ORIGINAL:
            operation, options = KINDS[name]
            sem_timm.patch_model(model, operation, **options)
        found[name] = model.to(device, dtype).eval()
    return found


def measured(kinds: dict[str, nn.Module], size: int, step: str, device: str, runs: int) -> dict[str, Any]:
    """Seconds of each round and peak MiB, by kind."""
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    images = torch.randn(1, 3, size, size, device=device, dtype=dtype)
    calls = {name: partial(STEPS[step], model, images) for name, model in kinds.items()}
    peak = {name: round(peak_mib(call, device), 1) for name, call in calls.items()}  # which also warms up
    clock: dict[str, Any] = {} if device == 'cuda' else {'timer': time.process_time}
    timers = {name: Timer('call()', globals={'call': call}, **clock) for name, call in calls.items()}
    rounds: dict[Any, list[float]] = {name: [] for name in calls}
    for run in range(runs):
        for name in list(calls) if run % 2 else reversed(list(calls)):
            rounds[name].append(timers[name].timeit(1).mean)
    times = Times(rounds)
    return {
        'seconds': {name: [round(second, 5) for second in found] for name, found in rounds.items()},
        'ratio': {name: round(times.ratio(name, ORIGINAL), 3) for name in calls},
        'peak_mib': peak,
    }


def page(rows: list[dict[str, Any]]) -> str:
    """What docs/attention_sizes.md says."""
    parts = [HEAD.format(runs=min(len(found) for row in rows for found in row['seconds'].values()))]
    for device, title in (('cpu', 'On a CPU'), ('cuda', 'On a GPU, against flash attention')):
        mine = [row for row in rows if row['device'] == device]
        if not mine:
            continue
        about = mine[-1]['machine']
        threads = 'One thread of ' if device == 'cpu' else ''
        parts.append(f'## {title}\n\n{threads}{about["processor"]}, torch {about["torch"]}, {mine[-1]["date"]}.\n')
        parts += [_table(step, [row for row in mine if row['step'] == step]) for step in STEPS]
        parts.append(_paying(mine))
    if not any(row['device'] == 'cuda' for row in rows):
        parts.append('No GPU was at hand; `--device cuda` measures on one, where the original is flash attention.\n')
    return '\n'.join(parts)


def _table(step: str, rows: list[dict[str, Any]]) -> str:
    sizes = ' | '.join(f'{row["size"]} px, {row["tokens"]:,} tokens' for row in rows)
    lines = [f'### {step.capitalize()}', '', f'| attention | {sizes} |', f'|---|{"---:|" * len(rows)}']
    for name in rows[0]['seconds']:
        cells = []
        for row in rows:
            ratio = '' if name == ORIGINAL else f', {row["ratio"][name]:.2f} ×'
            cells.append(f'{1e3 * median(row["seconds"][name]):,.0f} ms{ratio}; {row["peak_mib"][name]:,.0f} MiB')
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join([*lines, ''])


def _paying(rows: list[dict[str, Any]]) -> str:
    """From which size on each kind is faster than the original, in one sentence."""
    parts = []
    for step in STEPS:
        mine = sorted((row for row in rows if row['step'] == step), key=lambda row: row['size'])
        told = []
        for name in KINDS:
            slower = [row['tokens'] for row in mine if row['ratio'][name] >= 1]
            faster = [row['tokens'] for row in mine if row['tokens'] > max(slower, default=0)]
            told.append(f'*{name}* ' + (f'from {faster[0]:,} tokens on' if faster else 'at none of these sizes'))
        parts.append(f'in a {step} {", ".join(told)}')
    return f'Faster than the original are, as far as was measured, {"; ".join(parts)}.\n'


HEAD = """# The same ViT-S, larger and larger images

Time and memory of a whole model of the form of DINOv2-S/14, 12 blocks of 384 channels and 6 heads, patches of 14,
batch 1, with the attention of all blocks swapped: median of {runs} calls that took turns, ratio to the original (median
over the rounds), and the largest amount of memory that the call allocates beyond weights and image, counted by the
allocator. The original is `scaled_dot_product_attention`, which holds no table of pairs. A training step is a forward
and a backward of all weights. *own, local* are the maps of the values that a swap needs to keep its skill
([how much](transfer.md)). Rows: [attention_sizes.jsonl](attention_sizes.jsonl), by `benchmarks/attention_sizes.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--log', type=Path, required=True, help='file of rows')
    parser.add_argument('--page', type=Path, help='write this page from the rows, and run nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--sizes', type=int, nargs='+', default=SIZES, help='sides of images, multiples of 14')
    parser.add_argument('--runs', type=int, default=3, help='rounds per figure')
    args = parser.parse_args()
    if args.page:
        args.page.write_text(page(read_log(args.log)))
        return
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU here.')
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter('ignore', sem_timm.SwapWarning)
    for size in args.sizes:
        kinds: dict[str, nn.Module] = {}
        for step in STEPS:
            key = {'device': args.device, 'size': size, 'step': step}
            if is_logged(read_log(args.log), key):
                continue
            kinds = kinds or models(size, args.device)
            row = {**key, 'tokens': (size // PATCH) ** 2 + 1, **measured(kinds, size, step, args.device, args.runs)}
            date = str(datetime.date.today())
            append_record(args.log, {**row, 'date': date, 'machine': machine(args.device)})
            print(_table(step, [row]), flush=True)


if __name__ == '__main__':
    main()
