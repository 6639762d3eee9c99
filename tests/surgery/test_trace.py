"""Arguments and the training flag stay free, or what they decide is read again when it is met."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.surgery import edit_of
from tests.surgery.traced_blocks import assert_same_call, twins

# Arguments


def passes_on(self: Any, x: Tensor, mask: Tensor | None = None, twice: bool = False) -> Tensor:
    return x + self.pick(self.conv(x), mask, twice=twice)


@pytest.mark.parametrize('arguments', [{}, {'twice': True}, {'mask': None, 'twice': False}])
def test_arguments_that_are_only_passed_on_stay_free(arguments: dict[str, Any]) -> None:
    base, patched = twins(passes_on, **arguments)
    x, mask = torch.randn(2, 8, 8, 8), torch.rand(2, 1, 8, 8)
    assert_same_call(base, patched, x)
    assert_same_call(base, patched, x, mask)
    assert_same_call(base, patched, x, twice=True)
    assert_same_call(base, patched, x, mask, True)
    assert_same_call(base, patched, x=x, mask=mask, twice=False)


def decides_by_none(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    out = self.conv(x)
    if mask is not None:
        out = out * mask
    return x + out


def decides_by_flag(self: Any, x: Tensor, twice: bool = False) -> Tensor:
    out = self.conv(x)
    if twice:
        out = out * 2
    return x + out


def decides_by_text(self: Any, x: Tensor, mode: str = 'plain') -> Tensor:
    return x + (self.conv(x) if mode == 'plain' else self.conv(x) * 2)


def decides_by_number(self: Any, x: Tensor, times: int = 2) -> Tensor:
    out = x
    for _ in range(times):
        out = self.conv(out)
    return x + out


def computes_with_number(self: Any, x: Tensor, factor: int = 2) -> Tensor:
    return x + self.conv(x) * factor


@pytest.mark.parametrize(
    ('forward', 'name', 'value', 'other'),
    [
        (decides_by_flag, 'twice', False, True),
        (decides_by_flag, 'twice', True, False),
        (decides_by_text, 'mode', 'plain', 'double'),
        (decides_by_number, 'times', 2, 3),
    ],
)
def test_what_arguments_decide_is_followed(forward: Callable[..., Any], name: str, value: Any, other: Any) -> None:
    base, patched = twins(forward, **{name: value})
    x = torch.randn(2, 8, 8, 8)
    assert_same_call(base, patched, x, **{name: value})
    for each in (other, value, other):
        assert_same_call(base, patched, x, **{name: each})


def test_numbers_that_are_computed_with_stay_free() -> None:
    base, patched = twins(computes_with_number, factor=2)
    x = torch.randn(2, 8, 8, 8)
    for factor in (2, 3, 0.5):
        assert_same_call(base, patched, x, factor=factor)


def test_tensors_may_be_none_and_be_given() -> None:
    x, mask = torch.randn(2, 8, 8, 8), torch.rand(2, 1, 8, 8)
    base, patched = twins(decides_by_none)
    assert_same_call(base, patched, x)
    assert_same_call(base, patched, x, mask)
    base, patched = twins(decides_by_none, mask=torch.rand(2, 1, 8, 8))
    assert_same_call(base, patched, x, mask)
    assert_same_call(base, patched, x, mask=torch.rand(2, 8, 8, 8))
    assert_same_call(base, patched, x)


# Arguments without names of their own


def source_of(patched: nn.Module) -> str:
    edit = edit_of(patched)
    assert edit is not None
    return edit.source


def ignores_them(self: Any, x: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
    return x + self.conv(x)


def test_arguments_that_nobody_reads_stay_free() -> None:
    base, patched = twins(ignores_them)
    x = torch.randn(2, 8, 8, 8)
    assert_same_call(base, patched, x)
    assert_same_call(base, patched, x, x, mask=x)


def multiplies_by_all(self: Any, x: Tensor, *masks: Tensor) -> Tensor:
    out = self.conv(x)
    for mask in masks:
        out = out * mask
    return x + out


def test_arguments_by_place_are_read_as_many_as_were_given() -> None:
    x, mask, other = torch.randn(2, 8, 8, 8), torch.rand(2, 1, 8, 8), torch.rand(8, 1, 1)
    base, patched = twins(multiplies_by_all)
    assert_same_call(base, patched, x)
    assert 'if not (not masks' in source_of(patched)
    base, patched = twins(multiplies_by_all, mask, other)
    assert_same_call(base, patched, x, mask, other)
    assert 'len(masks) == 2' in source_of(patched)
    # Others are another case.
    assert_same_call(base, patched, x, mask)
    assert_same_call(base, patched, x)


def passes_all_on(self: Any, x: Tensor, **options: Any) -> Tensor:
    return x + self.pick(self.conv(x), **options)


def test_arguments_by_name_are_read_as_they_were_named() -> None:
    x, mask = torch.randn(2, 8, 8, 8), torch.rand(2, 1, 8, 8)
    base, patched = twins(passes_all_on, mask=mask, twice=True)
    assert_same_call(base, patched, x, mask=mask, twice=True)
    assert_same_call(base, patched, x, mask=mask, twice=False)
    assert "options.keys() == {'mask', 'twice'}" in source_of(patched)
    assert_same_call(base, patched, x, mask=mask)
    base, patched = twins(passes_all_on)
    assert_same_call(base, patched, x)
    assert_same_call(base, patched, x, mask=mask)


def decides_by_what_it_is_given(self: Any, x: Tensor, *args: Any, mask: Tensor, **options: Any) -> Tensor:
    if len(args) > 1 or options.get('twice', False):
        return x
    y = options['masks'][0] * self.conv(x) * args[0]
    return x + y * mask


def test_arguments_of_all_kinds_decide() -> None:
    x, mask = torch.randn(2, 8, 8, 8), torch.rand(2, 1, 8, 8)
    given = {'mask': mask, 'masks': (mask, mask), 'twice': False}
    base, patched = twins(decides_by_what_it_is_given, 2.0, **given)
    assert_same_call(base, patched, x, 2.0, **given)
    assert_same_call(base, patched, x, 3.0, **given)
    assert_same_call(base, patched, x, 2.0, **{**given, 'masks': (mask,)})
    with pytest.raises(sem_timm.GuardError):  # where nothing is added
        patched(x, 2.0, **{**given, 'twice': True})


def only_by_place(self: Any, x: Tensor, scale: float, /) -> Tensor:
    return x + self.conv(x) * scale


def test_arguments_that_have_no_name_for_the_caller() -> None:
    base, patched = twins(only_by_place, 2.0)
    assert_same_call(base, patched, torch.randn(2, 8, 8, 8), 3.0)


# Training mode


def differs_in_training(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    if self.training:
        out = out * 3
    return x + out


def drops_out(self: Any, x: Tensor) -> Tensor:
    return x + nn.functional.dropout(self.conv(x), 0.5, self.training)


@pytest.mark.parametrize('forward', [differs_in_training, drops_out])
def test_the_training_flag_stays_free(forward: Callable[..., Any]) -> None:
    base, patched = twins(forward)
    x = torch.randn(2, 8, 8, 8)
    assert_same_call(base, patched, x)
    patched.sem.eval()
    assert_same_call(base, patched, x)
    source = inspect.getsource(type(patched).forward)
    assert source.count('if self.training:') == 1 and source.count('self.sem(') == 2


def test_one_body_where_training_makes_no_difference() -> None:
    source = inspect.getsource(type(twins(passes_on)[1]).forward)
    assert 'training' not in source and source.count('self.sem(') == 1
