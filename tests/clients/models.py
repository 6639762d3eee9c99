"""A model as it is, patched, and patched with gates that do something: what a program is given in turn."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sem_timm
from tests.families import create
from tests.outputs import tensors
from tests.twins import trained

SIZE = 64


@dataclass(frozen=True)
class Models:
    """One network three times.

    Attributes:
        plain: As timm makes it, with norms that do not hide what is done to a branch.
        patched: With gates that are identities.
        stirred: With the same gates, and numbers in them that change the output.
    """

    plain: Any
    patched: Any
    stirred: Any

    def compare(self, use: Callable[[Any], Any], tolerance: float = 0.0) -> None:
        """Lets a program use all three: patched as plain, and stirred as nothing else.

        Args:
            use: Hands a model to the program and returns what comes of it, in tensors.
            tolerance: Largest difference of a number, as a part of the largest number.
        """
        plain, patched, stirred = use(self.plain), use(self.patched), use(self.stirred)
        assert_close(patched, plain, tolerance)
        assert not _are_close(stirred, plain, max(tolerance, 1e-4)), 'the gates have no effect in this program'

    def compare_with_plain_use(self, use: Callable[[Any], Any], x: Tensor, tolerance: float = 0.0) -> None:
        """Lets a program compute what a model makes of a batch: the same as the model by itself."""
        for model in (self.plain, self.patched, self.stirred):
            with torch.no_grad():
                expected = copy.deepcopy(model).eval()(x)
            assert_close(use(model), expected, tolerance)


def models(architecture: str = 'test_resnet', **options: Any) -> Models:
    """A small network of timm with SEM in it."""
    plain = create(architecture, **{'num_classes': 8, **options})
    patched = sem_timm.patch_model(copy.deepcopy(plain))
    return Models(plain, patched, trained(copy.deepcopy(patched)))


def swapped(architecture: str = 'test_vit', operation: str = 'external', **options: Any) -> nn.Module:
    """A small transformer of timm with another attention."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        return sem_timm.patch_model(create(architecture, **{'num_classes': 8, **options}), operation)


def images(batch_size: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(first: Any, second: Any, tolerance: float = 0.0) -> None:
    """Equal bit for bit, or to a part of the largest number."""
    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert one.shape == other.shape
        assert _are_close(one, other, tolerance), (one.float() - other.float()).abs().max()


def _are_close(first: Any, second: Any, tolerance: float) -> bool:
    for one, other in zip(tensors(first), tensors(second)):
        if one.shape != other.shape:
            return False
        one, other = one.detach().double(), other.detach().double()
        if (one - other).abs().max() > tolerance * max(1.0, float(other.abs().max())):
            return False
    return True
