"""How much memory a call needs at most."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch

# The profiler, which counts the memory, reports its start, its stop and every missing GPU otherwise.
os.environ.setdefault('KINETO_LOG_LEVEL', '6')


def peak_mib(call: Callable[[], object], device: str) -> float:
    """Peak MiB that a call allocates beyond what lives before it, counted by the allocator.

    Args:
        call: What is measured; it is called twice.
        device: Kind of the device that it runs on, 'cpu' or 'cuda'.
    """
    call()
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**20
