"""A model of a column and its patched twin, and how results of the two are compared."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.compatibility.families import COLUMNS, Column
from tests.outputs import loss_of, tensors
from tests.twins import assert_equal


class UnpatchedFails(Exception):
    """What was tried fails for timm's own model too."""


@contextmanager
def unpatched() -> Iterator[None]:
    """Where the model without a patch is put to the test."""
    try:
        yield
    except Exception as error:
        raise UnpatchedFails(f'{type(error).__name__}: {error}') from error


@dataclass(frozen=True)
class Twins:
    """A model with and without a patch, in evaluation mode and with the same weights.

    Attributes:
        name: Name of the column.
        operation: 'sem' or 'external'.
        base: The model without a patch.
        model: The patched one; with SEM it is an identity still.
    """

    name: str
    operation: str
    base: Any
    model: Any

    @property
    def column(self) -> Column:
        """The family."""
        return COLUMNS[self.name]

    @property
    def is_identity(self) -> bool:
        """Whether both give the same results."""
        return self.operation == 'sem'

    def images(self, batch_size: int = 2, size: int | None = None) -> Tensor:
        return self.column.images(batch_size, size)

    def moved(self, model: nn.Module | None = None) -> Any:
        """A copy of the patched model whose new parameters have left their initial values."""
        return move(copy.deepcopy(self.model if model is None else model))

    def variant(self, **options: Any) -> Any:
        """What timm's registry makes under the name of the variant, as it is right after a patch."""
        suffix, fixed = ('sem', {'sem_init': 'identity'}) if self.operation == 'sem' else ('ea', {})
        arguments = {'num_classes': 10, **self.column.options, **fixed, **options}
        return timm.create_model(f'{self.column.architecture}_{suffix}', **arguments).eval()

    def patch(self, model: nn.Module, input_size: tuple[int, ...] | None = None) -> Any:
        """Patches another model as this one is."""
        return patch(model, self.operation, input_size or self.column.input_size)

    def same(self, use: Callable[[Any], Any], **tolerance: float) -> None:
        """What `use` makes of both models is the same at the identity; in any case both or neither can be used."""
        with unpatched():
            expected = use(self.base)
        found = use(self.model)
        if self.is_identity:
            (assert_close if tolerance else assert_equal)(found, expected, **tolerance)
        assert [each.shape for each in tensors(found)] == [each.shape for each in tensors(expected)]


def make(operation: str, name: str, **options: Any) -> Twins:
    """New twins; with options of the model where they are not the column's."""
    if options:
        base: nn.Module = COLUMNS[name].create(**options)
        return Twins(name, operation, base, patch(copy.deepcopy(base), operation, COLUMNS[name].input_size))
    return Twins(name, operation, copy.deepcopy(_base(name)), copy.deepcopy(_patched(operation, name)))


def patch(model: nn.Module, operation: str, input_size: tuple[int, ...]) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        torch.manual_seed(0)
        return sem_timm.patch_model(model, operation, input_size=input_size)


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a patch put into a model or into what was made of one, by name."""
    return {name: p for name, p in model.named_parameters() if re.search(r'(^|\.)(sem|core)\.', name)}


def move(model: nn.Module) -> Any:
    """Gives the new parameters values that change the output."""
    generator = torch.Generator().manual_seed(5)
    for parameter in new_parameters(model).values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@cache
def _base(name: str) -> nn.Module:
    return COLUMNS[name].create()


@cache
def _patched(operation: str, name: str) -> nn.Module:
    return patch(copy.deepcopy(_base(name)), operation, COLUMNS[name].input_size)


def gradients(model: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The gradients of all parameters that get one, by name; of a loss of what ``call`` returns, or the model."""
    model.zero_grad()
    torch.manual_seed(3)  # for dropout and stochastic depth
    loss_of((model if call is None else call)(*inputs)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(
    twins: Twins,
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    *,
    model: nn.Module | None = None,
    **tolerance: float,
) -> None:
    """Base parameters have gradients as without the patch, where that is an identity, and new parameters have some."""
    if twins.is_identity:
        same = {name: found[name] for name in expected}
        (assert_close if tolerance else assert_equal)(same, expected, **tolerance)
    new = set(new_parameters(model or twins.model))
    assert new and new <= found.keys(), new - found.keys()


def assert_close(found: Any, expected: Any, rtol: float = 1e-4, scale: float = 1e-4) -> None:
    """Equal up to rounding: ``rtol`` of each number, and ``scale`` of the largest of all."""
    found, expected = tensors(found), tensors(expected)
    assert len(found) == len(expected)
    largest = max(float(other.detach().abs().max()) for other in expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=rtol, atol=scale * largest, check_dtype=False)
