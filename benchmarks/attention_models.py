"""A whole vision transformer, `vit_small_patch16_224`, with external attention and as timm has it.

    python benchmarks/attention_models.py

One thread, eager, float32; both sides take turns in one process, and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import sem_timm
from common.measuring import Line, options, peak_mib, prepared, record, take_turns

NAME = 'vit_small_patch16_224'
ORIGINAL = 'original'
FORWARD_GOALS = {224: 0.90, 512: 0.75}
TRAINING_GOAL = 0.95


def both(operation: str, image_size: int) -> dict[str, nn.Module]:
    """The swapped model and the original."""
    swapped, original = (timm.create_model(NAME, img_size=image_size) for _ in range(2))
    return {operation: sem_timm.patch_model(swapped, operation), ORIGINAL: original}


@torch.inference_mode()
def forward(model: nn.Module, images: torch.Tensor) -> None:
    """One forward without gradients."""
    model(images)


def training_step(model: nn.Module, images: torch.Tensor) -> None:
    """One forward and backward, and gradients freed again."""
    model(images).logsumexp(-1).mean().backward()
    model.zero_grad(set_to_none=True)


def compare(operation: str, image_size: int, training: bool, args: argparse.Namespace) -> list[Line]:
    """The ratio of both sides' times, and of their memory in training."""
    images = torch.randn(args.batch_size, 3, image_size, image_size, device=args.device)
    step: Callable[[nn.Module, torch.Tensor], None] = training_step if training else forward
    models = {name: model.to(args.device).train(training) for name, model in both(operation, image_size).items()}
    calls: dict[Any, Callable[[], object]] = {name: partial(step, model, images) for name, model in models.items()}
    title = f'{operation} / {ORIGINAL}, {image_size} px, {"forward + backward" if training else "forward"}'
    goal = TRAINING_GOAL if training else FORWARD_GOALS.get(image_size)
    times = take_turns(calls, args.runs, args.device)
    lines = [times.line(title, operation, ORIGINAL, goal if operation == 'external' else None)]
    if training:
        mib = {name: peak_mib(call, args.device) for name, call in calls.items()}
        lines.append(Line(f'{title}, memory', mib[operation] / mib[ORIGINAL], None, mib, 'MiB'))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--operations', nargs='*', default=['external'], help='goals are for external attention')
    args = prepared(parser, arguments)
    warnings.simplefilter('ignore', sem_timm.SwapWarning)
    lines = []
    for operation in args.operations:
        for image_size, training in ((32, True),) if args.quick else ((224, False), (224, True), (512, False)):
            lines += compare(operation, image_size, training, args)
    setting = {'model': NAME, 'batch': args.batch_size, 'dtype': 'torch.float32', 'compiled': False}
    record(args.out, args.device, 'model', lines, setting=setting)


if __name__ == '__main__':
    main()
