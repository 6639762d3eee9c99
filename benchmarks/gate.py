"""SEM with the residual add against timm's squeeze-and-excitation with it, in inference.

    python benchmarks/gate.py                 # one thread of a CPU, eager, float32
    python benchmarks/gate.py --device cuda   # batch 256, bfloat16, eager and compiled, also against a copy in memory

Both sides take turns in one process, in series that keep the caches their own; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import SEModule
from torch import Tensor, nn

from common.measuring import Line, options, prepared, record, take_turns
from sem_timm.layers import SEM

GOALS = {(8, 256, 56, 56): 0.75, (8, 1024, 14, 14): 0.80}
COPY_GOAL = 1.3
SIZES = {'cpu': tuple(GOALS), 'cuda': ((256, 256, 56, 56), (256, 1024, 14, 14), (256, 2048, 7, 7))}
FORMATS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}

# A call of a few milliseconds that starts from what the other system left in the caches is not what a network sees.
SERIES_SECONDS = 0.15


def systems(shape: tuple[int, ...], layout: str, args: argparse.Namespace, compiled: bool) -> dict[Any, Any]:
    """A call of each system on equal inputs."""
    dtype = torch.bfloat16 if args.device == 'cuda' else torch.float32
    generator = torch.Generator().manual_seed(0)
    branch, shortcut = (
        torch.randn(shape, generator=generator).to(args.device, dtype).contiguous(memory_format=FORMATS[layout])
        for _ in range(2)
    )
    sem, squeeze_excitation = (cls(shape[1]).eval().to(args.device, dtype) for cls in (SEM, SEModule))

    def with_add(x: Tensor, shortcut: Tensor) -> Tensor:
        return squeeze_excitation(x) + shortcut

    gated: nn.Module | Callable[..., Tensor] = sem
    if compiled:
        torch.compiler.reset()
        gated, with_add = (torch.compile(each, fullgraph=True, dynamic=False) for each in (sem, with_add))
    calls: dict[Any, Callable[[], object]] = {
        'SEM + add': lambda: gated(branch, shortcut),
        'timm SE + add': lambda: with_add(branch, shortcut),
    }
    if args.device == 'cuda':
        # Pooling reads one tensor, the rest reads two and writes one: four, as a copy of two.
        source, target = torch.stack((branch, shortcut)), torch.empty((2, *shape), device=args.device, dtype=dtype)
        calls['copy of as many bytes'] = lambda: target.copy_(source)
    return calls


def lines(args: argparse.Namespace) -> Iterator[Line]:
    """The ratios at all sizes, in both layouts."""
    sizes = ((2, 16, 8, 8),) if args.quick else SIZES[args.device]
    for compiled in (False, True) if args.device == 'cuda' else (False,):
        for layout in FORMATS:
            for shape in sizes:
                times = take_turns(systems(shape, layout, args, compiled), args.runs, args.device, SERIES_SECONDS)
                where = f'{"x".join(map(str, shape))} {layout}{", compiled" if compiled else ""}'
                goal = GOALS.get(shape) if layout == 'contiguous' else None
                yield times.line(f'SEM + add / SE + add, {where}', 'SEM + add', 'timm SE + add', goal)
                if args.device == 'cuda':
                    names = 'SEM + add', 'copy of as many bytes'
                    yield times.line(f'SEM + add / copy, {where}', *names, COPY_GOAL if compiled else None)


def main(arguments: Sequence[str] | None = None) -> None:
    args = prepared(options(__doc__), arguments)
    with torch.inference_mode():
        record(args.out, args.device, 'gate', list(lines(args)))


if __name__ == '__main__':
    main()
