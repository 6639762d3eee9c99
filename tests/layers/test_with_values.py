"""A core with maps of the values: against written-out formulas, and as nothing at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm import AttentionCore, OptionError
from sem_timm.layers import WithValues
from tests.layers.attention_inputs import NAMES, TOKENS, build, close, trained

GRID = {'grid_size': (5, 4), 'num_prefix_tokens': 1}


def tokens(core: AttentionCore, *leading: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    widths = core.head_dim, core.head_dim, core.value_dim
    q, k, v = (torch.randn(*leading, TOKENS, d, generator=generator, dtype=torch.float64) for d in widths)
    return q, k, v


def plain(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
    return core(q, k, v, *mask) if core.reads_keys else core(q, *mask)


@pytest.mark.parametrize('num_heads', [1, 3])
@pytest.mark.parametrize('name', NAMES)
def test_at_first_it_returns_what_the_core_does(name: str, num_heads: int) -> None:
    core = build(name, num_heads=num_heads)
    both = WithValues(core, True, True, **GRID, dtype=torch.float64)
    given = tokens(core, 2, 3)
    close(both(*given), plain(core, *given))


def test_the_sum_of_maps_written_out() -> None:
    core = build('linear', num_heads=3)
    both = trained(WithValues(core, True, True, **GRID, dtype=torch.float64))
    q, k, v = tokens(core, 2, 3)
    assert both.terms == ('core', 'value', 'mean', 'first', 'local') and both.around is not None
    image = v[:, :, 1:].mT.reshape(2, 15, 5, 4)
    around = F.conv2d(image, both.around, padding=1, groups=15).reshape(2, 3, 5, 20).mT
    around = F.pad(around, (0, 0, 1, 0))
    terms = [core(q, k, v), v, v.mean(-2, keepdim=True), v[:, :, :1], around]
    for kind, some in ((0, slice(1, None)), (1, slice(0, 1))):
        maps = both.mix[kind]
        expected = sum((term.expand_as(v) @ maps[n] for n, term in enumerate(terms)), both.bias[kind][:, None])
        close(both(q, k, v)[:, :, some], expected[:, :, some])


def test_heads_behind_tokens_or_before_windows_have_their_own_maps() -> None:
    core = build('linear', num_heads=3, head_axis=-4)
    both = trained(WithValues(core, True, True, **GRID, dtype=torch.float64))
    given = tokens(core, 2, 3, 7)
    folded = trained(WithValues(build('linear', num_heads=3), True, True, **GRID, dtype=torch.float64))
    windows = [folded(*(x[:, :, window] for x in given)) for window in range(7)]
    close(both(*given), torch.stack(windows, 2))


@pytest.mark.parametrize('name', ['linear', 'external'])
def test_masked_tokens_are_neither_in_the_mean_nor_around_others(name: str) -> None:
    core = build(name)
    both = trained(WithValues(core, True, True, **GRID, dtype=torch.float64))
    q, k, v = tokens(core, 2)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[[7, 20]] = False
    other = v.clone()
    other[:, ~mask] += 5.0
    first, second = (both(q, k, x, mask[None, None]) for x in (v, other))
    close(first[:, mask], second[:, mask])
    assert not torch.allclose(both(q, k, v)[:, mask], both(q, k, other)[:, mask])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(dict(own=1), 'own=1: write own=True'), (dict(local='yes'), "local='yes': write local=True")],
)
def test_switches_that_say_neither_yes_nor_no(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WithValues(build('linear'), **arguments)


def test_tokens_without_a_grid_and_values_of_other_tokens() -> None:
    core = build('linear')
    q, k, v = tokens(core)
    with pytest.raises(OptionError, match='local=True got 21 tokens; without 0 prefix tokens that is no square'):
        WithValues(core, local=True, dtype=torch.float64)(q, k, v)
    with pytest.raises(OptionError, match='5 queries and 21 values'):
        WithValues(core, dtype=torch.float64)(q[:5], k, v)
