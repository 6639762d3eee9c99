"""Whole networks with SEM against the same with squeeze-and-excitation in the same places, and against plain ones.

    python benchmarks/models.py                 # one thread of a CPU, batch 8 at 224 pixels, float32
    python benchmarks/models.py --device cuda   # batch 256, bfloat16 and float32, eager and compiled

All three take turns in one process; ratios are medians over rounds. Memory is the peak of a training step beyond the
weights, counted by the allocator; of some networks nothing else is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import sem_timm
from common.measuring import Line, options, peak_mib, prepared, record, take_turns

NETWORKS = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224')
MEMORY_ONLY = ('regnety_008', 'efficientnet_b0', 'mobilenetv3_large_100')
FORWARD, TRAINING, MEMORY = 'forward', 'forward + backward', 'peak memory'
GOALS = {
    ('resnet50', 'SE', FORWARD): 1.00,
    ('resnet50', 'plain', FORWARD): 1.01,
    ('resnet50', 'SE', TRAINING): 0.98,
    ('resnet50', 'plain', TRAINING): 1.03,
    ('resnet50', 'plain', MEMORY): 1.02,
    ('regnety_008', 'plain', MEMORY): 1.05,
    ('efficientnet_b0', 'plain', MEMORY): 1.05,
    ('mobilenetv3_large_100', 'plain', MEMORY): 1.05,
    ('convnext_tiny', 'plain', TRAINING): 1.06,
    ('convnext_tiny', 'plain', MEMORY): 1.01,
    ('vit_small_patch16_224', 'plain', TRAINING): 1.06,
    ('vit_small_patch16_224', 'plain', MEMORY): 1.02,
}
COMPILED_TRAINING_GOAL = 1.03  # of the plain network, on a GPU


def systems(network: str, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The network with SEM, with squeeze-and-excitation, and plain."""
    has_own = timm.is_model(f'se{network}')
    models = {
        'SEM': timm.create_model(f'{network}_sem'),
        'SE': timm.create_model(f'se{network}') if has_own else sem_timm.patch_model(timm.create_model(network), 'se'),
        'plain': timm.create_model(network),
    }
    if args.device == 'cpu':
        return models
    layout: dict[str, Any] = {} if network.startswith('vit') else {'memory_format': torch.channels_last}
    return {name: model.to(args.device, dtype, **layout) for name, model in models.items()}


def training_step(model: Callable[..., torch.Tensor], owner: nn.Module, images: torch.Tensor) -> None:
    """One forward and backward, and gradients freed again."""
    model(images).logsumexp(-1).mean().backward()
    owner.zero_grad(set_to_none=True)


@torch.no_grad()
def forward(model: Callable[..., torch.Tensor], owner: nn.Module, images: torch.Tensor) -> None:
    """One forward without gradients."""
    model(images)


def compare(network: str, args: argparse.Namespace, compiled: bool, dtype: torch.dtype) -> Iterator[Line]:
    """The ratios of SEM to both others in one network."""
    models = systems(network, args, dtype)
    size = next(iter(models.values())).pretrained_cfg['input_size'] if not args.quick else (3, 64, 64)
    images = torch.randn(args.batch_size, *size, device=args.device, dtype=dtype)
    note = (
        f'{", compiled" if compiled else ""}{", float32" if args.device == "cuda" and dtype == torch.float32 else ""}'
    )
    for what, step in ((FORWARD, forward), (TRAINING, training_step)):
        calls: dict[Any, Callable[[], object]] = {}
        torch.compiler.reset()
        for name, model in models.items():
            model.train(step is training_step)
            run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
            calls[name] = partial(step, run, model, images)
        if network not in MEMORY_ONLY:
            times = take_turns(calls, args.runs, args.device)
            for other in ('SE', 'plain'):
                goal = _goal(network, other, what, args, compiled)
                yield times.line(f'{network}, SEM / {other}, {what}{note}', 'SEM', other, goal)
        if step is training_step:
            mib = {name: peak_mib(call, args.device) for name, call in calls.items()}
            for other in ('SE', 'plain'):
                goal = _goal(network, other, MEMORY, args, compiled)
                sides = {name: mib[name] for name in ('SEM', other)}
                yield Line(f'{network}, SEM / {other}, {MEMORY}{note}', mib['SEM'] / mib[other], goal, sides, 'MiB')


def _goal(network: str, other: str, what: str, args: argparse.Namespace, compiled: bool) -> float | None:
    if compiled and other == 'plain' and what == TRAINING:
        return COMPILED_TRAINING_GOAL
    return GOALS.get((network, other, what)) if args.device == 'cpu' else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, runs=7)
    parser.add_argument('--batch-size', type=int, help='by default 8 on a CPU, 256 on a GPU')
    parser.add_argument('--networks', nargs='*', default=NETWORKS + MEMORY_ONLY)
    args = prepared(parser, arguments)
    args.batch_size = args.batch_size or (1 if args.quick else 8 if args.device == 'cpu' else 256)
    networks = ('test_resnet',) if args.quick else args.networks
    lines: list[Line] = []
    on_gpu = args.device == 'cuda'
    for network in networks:
        for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
            for compiled in (False, True) if on_gpu else (False,):
                lines += compare(network, args, compiled, dtype)
    setting = {'batch': args.batch_size, 'dtype': 'bfloat16, or as noted' if on_gpu else 'float32'}
    record(args.out, args.device, 'models', lines, setting=setting)


if __name__ == '__main__':
    main()
