"""Work that may draw random numbers, beside which the random generators of the process stand still."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def preserved_random_state(*, on_gpus: bool = True, after_success: bool = True) -> Iterator[None]:
    """Puts back the state of the random generators of torch, Python and numpy, also after an error.

    Args:
        on_gpus: Whether those of GPUs that are in use count too.
        after_success: Whether to do so also if there is no error.
    """
    numpy_random = sys.modules.get('numpy.random')  # where nobody has imported it, nobody has drawn from it
    with ExitStack() as putting_back:
        putting_back.callback(torch.set_rng_state, torch.get_rng_state())
        if on_gpus and torch.cuda.is_initialized():
            putting_back.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        putting_back.callback(random.setstate, random.getstate())
        if numpy_random:
            putting_back.callback(numpy_random.set_state, numpy_random.get_state())
        yield
        if not after_success:
            putting_back.pop_all()


def random_states() -> tuple[Any, ...]:
    """The states of the random generators of torch on the CPU, Python and numpy, to be compared."""
    numpy_random = sys.modules.get('numpy.random')
    _, keys, place, *_ = numpy_random.get_state() if numpy_random else ('', b'', 0)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), bytes(keys), place
