"""Work beside which the random generators of the process stand still."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Seeds the random generators, and sets them back to what they were, also after an error."""
    numpy_random = sys.modules.get('numpy.random')
    numpy_state = numpy_random.get_state() if numpy_random else None
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy_random:
                numpy_random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(state)
        if numpy_random:
            numpy_random.set_state(numpy_state)
