"""Arguments and the training flag stay free, or what they decide is read again when it is met."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import RefusedError
from tests.surgery.traced_blocks import SIZE, Net, assert_same_call, block, twins

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


def many_arguments(self: Any, x: Tensor, *masks: Tensor) -> Tensor:
    return x + self.conv(x)


def many_keywords(self: Any, x: Tensor, **masks: Tensor) -> Tensor:
    return x + self.conv(x)


@pytest.mark.parametrize('forward', [many_arguments, many_keywords])
def test_any_number_of_arguments_only_at_the_output(forward: Callable[..., Any]) -> None:
    model = Net(block(forward))
    with pytest.raises(RefusedError, match=r'Block_many_\w+\.forward.*arguments'):
        sem_timm.plan_model(model, target='block', position='residual', input_size=SIZE)
    x = torch.randn(2, 8, 8, 8)
    expected = model.block(x)
    sem_timm.patch_model(model, target='block', input_size=SIZE)
    more = (x,) if forward is many_arguments else ()
    named = {'mask': x} if forward is many_keywords else {}
    assert torch.equal(expected, model.block(x, *more, **named))
    assert [site.position for site in sem_timm.patched_modules(model)] == ['output']


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
