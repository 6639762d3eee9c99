"""Work that may draw random numbers, beside which the random generators of the process stand still."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def preserved_random_state(*, on_gpus: bool = True) -> Iterator[None]:
    """Puts back the state of the random generators of torch, Python and numpy, also after an error.

    Args:
        on_gpus: Whether those of GPUs that are in use count too.
    """
    numpy_random = sys.modules.get('numpy.random')  # where nobody has imported it, nobody has drawn from it
    numpy_state = numpy_random.get_state() if numpy_random else None
    state = random.getstate()
    gpus = range(torch.cuda.device_count()) if on_gpus and torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


def random_states() -> tuple[Any, ...]:
    """The states of the random generators of torch on the CPU, Python and numpy, to be compared."""
    numpy_random = sys.modules.get('numpy.random')
    _, keys, place, *_ = numpy_random.get_state() if numpy_random else ('', b'', 0)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), bytes(keys), place
