"""Whole networks: `resnet50_sem` against timm's `seresnet50`, and against plain `resnet50`.

    python benchmarks/models.py

One thread, batch 8 at 224 pixels, alternating runs in one process, medians. Memory is the peak of a training step.
Goals: at most 1.00 of `seresnet50` in each of forward, forward + backward and memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from measuring import peak_mib
from torch import nn

import sem_timm  # noqa: F401  registers the variants

NAMES = ('resnet50_sem', 'seresnet50', 'resnet50')


def training_step(model: nn.Module, images: torch.Tensor) -> None:
    """One forward and backward, and gradients freed again."""
    model(images).logsumexp(-1).mean().backward()
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def forward(model: nn.Module, images: torch.Tensor) -> None:
    """One forward without gradients."""
    model(images)


def medians(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of each step; they take turns in changing order, so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name in list(steps) if run % 2 else reversed(list(steps)):
            start = time.perf_counter()
            steps[name]()
            if run:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_memory(name: str, batch_size: int) -> float:
    """Peak MiB that one training step allocates beyond weights and images: activations, scratch and gradients.

    Counted by the allocator, not from the resident size of the process, so it is the same in every run.
    """
    model, images = timm.create_model(name).train(), torch.randn(batch_size, 3, 224, 224)
    return peak_mib(lambda: training_step(model, images), 'cpu')


def report(title: str, unit: str, values: dict[str, float]) -> None:
    """One row: each network's figure, and the ratios that matter."""
    figures = '  '.join(f'{name} {value:8.3f} {unit}' for name, value in values.items())
    sem, se, plain = (values[name] for name in NAMES)
    print(f'{title:20} {figures}  sem/se {sem / se:.3f}  sem/plain {sem / plain:.3f}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=12)
    parser.add_argument('--batch-size', type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report('peak memory', 'MiB', {name: training_memory(name, args.batch_size) for name in NAMES})
    images = torch.randn(args.batch_size, 3, 224, 224)
    models = {name: timm.create_model(name) for name in NAMES}
    for model in models.values():
        model.eval()
    report('forward', 's', medians({n: (lambda m=m: forward(m, images)) for n, m in models.items()}, args.runs))
    for model in models.values():
        model.train()
    steps = {n: (lambda m=m: training_step(m, images)) for n, m in models.items()}
    report('forward + backward', 's', medians(steps, args.runs))


if __name__ == '__main__':
    main()
