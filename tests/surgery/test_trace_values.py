"""What a forward asks of its input is followed, or refused with the line; it is not baked in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import RefusedError, SemTimmError
from tests.families import FAMILIES
from tests.snapshot import assert_same, snapshot
from tests.surgery.traced_blocks import SIZE, Net, assert_same_call, block, twins


def reshapes(self: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out = self.conv(x).reshape(batch, channels, height * width)
    return x + out.transpose(1, 2).transpose(1, 2).reshape(batch, channels, height, -1)


def scales_by_size(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) / (x.shape[-1] * x.size(0)) ** 0.5


def pads_odd_sizes(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    if x.shape[-1] % 2:
        out = nn.functional.pad(out[..., :-1], (0, 1))
    return x + out


def windows_if_large(self: Any, x: Tensor) -> Tensor:
    if x.size(-1) > 8 or x.size(0) > 3:
        return x + self.conv(x) * 0.5
    return x + self.conv(x)


def unpacks_rows(self: Any, x: Tensor) -> Tensor:
    return x + torch.stack([self.conv(row[None])[0] for row in x])


def makes_indices(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x)[..., torch.arange(x.shape[-1], device=x.device)]


def makes_a_grid(self: Any, x: Tensor) -> Tensor:
    grid = torch.linspace(0, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    return x + self.conv(x) * grid


def caches_by_size(self: Any, x: Tensor) -> Tensor:
    key = (x.shape[-1], x.dtype)
    if key not in self.cache:
        self.cache[key] = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    return x + self.conv(x) * self.cache[key]


def asks_for_the_type(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    return x + (out * 2 if x.dtype == torch.float64 else out)


def asks_for_gradients(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    return x + (out * 2 if torch.is_grad_enabled() else out)


def counts_its_calls(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x + self.conv(x)


def updates_a_buffer(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3), keepdim=True), alpha=0.5)
    return x + self.conv(x - self.mean)


def draws_random_numbers(self: Any, x: Tensor) -> Tensor:
    return x + self.conv(x) * torch.rand_like(x[:, :1])


def asks_for_values_in_training(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    if self.training and x.mean() > 0:  # only the numbers can tell
        out = out * 2
    return x + out


AWKWARD = [
    reshapes,
    scales_by_size,
    pads_odd_sizes,
    windows_if_large,
    unpacks_rows,
    makes_indices,
    makes_a_grid,
    caches_by_size,
    asks_for_the_type,
    asks_for_gradients,
    updates_a_buffer,
    draws_random_numbers,
    asks_for_values_in_training,
]

INPUTS = [(2, 8, 8, 8), (1, 8, 8, 8), (5, 8, 8, 8), (2, 8, 16, 16), (2, 8, 7, 9), (2, 8, 8, 5)]


@pytest.mark.parametrize('forward', AWKWARD)
def test_another_input_gives_what_it_should(forward: Callable[..., Any]) -> None:
    try:
        base, patched = twins(forward)
    except RefusedError as refusal:
        assert forward in MAY_BE_REFUSED, refusal
        assert f'Block_{forward.__name__}' in str(refusal)
        return
    for shape in INPUTS:
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype)
            for each in (base, patched):
                each.to(dtype)
            assert_same_call(base, patched, x)
            assert torch.equal(base.mean, patched.mean)


MAY_BE_REFUSED = (
    asks_for_the_type,
    unpacks_rows,
    makes_indices,
    makes_a_grid,
    caches_by_size,
    asks_for_gradients,
    asks_for_values_in_training,
)


def test_gradients_are_asked_for_at_run_time() -> None:
    try:
        base, patched = twins(asks_for_gradients)
    except RefusedError:
        return
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(base(x), patched(x))
    with torch.no_grad():
        assert torch.equal(base(x), patched(x))


def test_what_depends_on_numbers_is_refused_with_its_line() -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(n for n, text in enumerate(lines, 1) if 'only the numbers can tell' in text)
    model = Net(block(asks_for_values_in_training))
    with pytest.raises(RefusedError) as caught:
        sem_timm.plan_model(model, target='block', position='residual', input_size=SIZE)
    assert f'{Path(__file__).name}:{number}: if self.training and x.mean() > 0:' in str(caught.value)
    (site,) = sem_timm.plan_model(model, target='block', input_size=SIZE)
    assert site.position == 'output'


def asks_for_values(self: Any, x: Tensor) -> Tensor:
    if x.mean() > 0:  # no meta tensor can tell
        return x + self.conv(x)
    return x


def test_a_model_that_does_not_run_without_numbers_is_refused_with_the_line() -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(n for n, text in enumerate(lines, 1) if 'no meta tensor can tell' in text)
    with pytest.raises(SemTimmError) as caught:
        sem_timm.plan_model(Net(block(asks_for_values)), input_size=SIZE)
    assert f'{Path(__file__).name}:{number}' in str(caught.value)


# The live module


@pytest.mark.parametrize('forward', [counts_its_calls, caches_by_size, updates_a_buffer])
def test_tracing_leaves_the_live_module_alone(forward: Callable[..., Any]) -> None:
    for training in (False, True):
        model = Net(block(forward)).train(training)
        before = snapshot(model)
        with suppress(RefusedError):
            sem_timm.plan_model(model, target='block', input_size=SIZE)
        assert_same(before, snapshot(model))
        assert model.block.calls == 0 and model.block.cache == {}


def test_side_effects_of_a_forward_survive() -> None:
    model = Net(block(counts_its_calls))
    try:
        sem_timm.patch_model(model, target='block', input_size=SIZE)
    except RefusedError as refusal:
        assert 'Block_counts_its_calls' in str(refusal)
    for _ in range(3):
        model(torch.randn(1, *SIZE))
    assert model.block.calls == 3


@pytest.mark.parametrize('name', ['levit', 'tiny_vit'])
def test_attention_bias_caches_stay_empty(name: str) -> None:
    family = FAMILIES[name]
    model = family.create()
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, 'attention_bias_cache')]
    before = snapshot(model)
    sem_timm.plan_model(model, branches='all')
    assert_same(before, snapshot(model))
    assert caches and not any(caches)
    with torch.no_grad():
        model(family.images(1))
    filled = [dict(cache) for cache in caches]
    sem_timm.plan_model(model, branches='all')
    for cache, kept in zip(caches, filled):
        assert cache.keys() == kept.keys() and all(cache[key] is kept[key] for key in kept)
