"""Work of a seed of its own, beside which the random generators of the process stand still."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sem_timm.random_state import preserved_random_state


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Seeds the random generators, and sets them back to what they were, also after an error."""
    with preserved_random_state(), torch.inference_mode(False):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy_random := sys.modules.get('numpy.random'):
            numpy_random.seed(seed % 2**32)
        yield
