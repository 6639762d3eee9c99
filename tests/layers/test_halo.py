"""Halo attention: its formula query by query, its grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.block_grid import BlockGrid
from sem_timm.layers.halo import HaloAttention
from tests.layers.attention_inputs import both_modes, close, inputs, trained


def written_out(core: HaloAttention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """One head, one sample: the outputs query by query, from the keys in reach that a mask (N,) keeps."""
    prefix, block, halo = core.num_prefix_tokens, core.block_size, core.halo_size
    outputs = []
    for index in range(len(q)):
        scores, values = [], []
        row, column = divmod(index - prefix, grid[1])
        top, left = row // block * block, column // block * block
        for other in range(len(k)):
            y, x = divmod(other - prefix, grid[1])
            reach = top - halo <= y < top + block + halo and left - halo <= x < left + block + halo
            if not keep[other] or (index >= prefix and other >= prefix and not reach):
                continue
            score = q[index] @ k[other] / core.head_dim**0.5
            if index >= prefix and other >= prefix:
                score = score + q[index] @ core.relative_height[y - row + block - 1 + halo]
                score = score + q[index] @ core.relative_width[x - column + block - 1 + halo]
            scores.append(score)
            values.append(v[other])
        outputs.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
    return torch.stack(outputs)


@pytest.mark.parametrize(('block', 'halo', 'grid', 'prefix'), [
    (8, 3, (3, 3), 0), (2, 1, (5, 3), 1), (3, 0, (4, 7), 2), (1, 2, (3, 5), 0), (2, 4, (6, 4), 1), (4, 1, (1, 9), 5),
])  # fmt: skip
@pytest.mark.parametrize('masked', [False, True])
def test_output_follows_the_equations_query_by_query(
    block: int, halo: int, grid: tuple[int, int], prefix: int, masked: bool
) -> None:
    core = trained(
        HaloAttention(
            5, 3, block_size=block, halo_size=halo, grid_size=grid, num_prefix_tokens=prefix, dtype=torch.float64
        )
    )
    count = prefix + grid[0] * grid[1]
    q, k, v = inputs(core, 2, 2, queries=count)
    keep = torch.ones(2, 1, 1, count, dtype=torch.bool)
    # Two tokens that do not touch, so that every query keeps a key in reach.
    keep[0, ..., [0, count - 1]] = not masked
    for out in both_modes(lambda: core(q, k, v, attn_mask=keep if masked else None)):
        for sample in range(2):
            for head in range(2):
                at = (sample, head)
                seen = [row for row in range(count) if block > 1 or halo or keep[sample, 0, 0, row]]
                expected = written_out(core, q[at], k[at], v[at], keep[sample, 0, 0], grid)
                close(out[at][seen], expected[seen].detach())


@pytest.mark.parametrize('num_prefix_tokens', [0, 1])
def test_a_block_as_large_as_the_grid_is_plain_attention(num_prefix_tokens: int) -> None:
    core = HaloAttention(6, 4, block_size=5, halo_size=2, num_prefix_tokens=num_prefix_tokens, dtype=torch.float64)
    q, k, v = inputs(core, 2, 3, queries=16 + num_prefix_tokens)
    close(core(q, k, v).detach(), torch.softmax(q @ k.mT / 6**0.5, -1) @ v)


def test_relative_positions_start_at_zero_and_learn_at_once() -> None:
    core = HaloAttention(6, num_heads=2, block_size=2, halo_size=1)
    assert {key: tuple(value.shape) for key, value in core.state_dict().items()} == {
        'relative_height': (2, 5, 6), 'relative_width': (2, 5, 6),
    }  # fmt: skip
    assert not any(value.any() for value in core.state_dict().values())
    core(*inputs(core, 2, 2, queries=36, dtype=torch.float32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().amin() > 0 for p in core.parameters())


def test_any_square_runs_beside_the_grid_given() -> None:
    core = HaloAttention(4, block_size=2, halo_size=1, grid_size=[3, 12], num_prefix_tokens=1)
    assert core.grid(37) == (3, 12) and core.grid(50) == (7, 7) and core.grid(2) == (1, 1)
    assert HaloAttention(4).grid(36) == (6, 6)
    assert core(*inputs(core, 2, queries=26, dtype=torch.float32)).shape == (2, 26, 4)


@pytest.mark.parametrize('tokens', [0, 1, 38, 51])
def test_tokens_that_form_no_grid_are_refused(tokens: int) -> None:
    core = HaloAttention(4, grid_size=(3, 12), num_prefix_tokens=1)
    with pytest.raises(OptionError, match=rf'(?s)got {tokens} tokens; without 1 prefix.*grid_size=\(height, width\)'):
        core(*inputs(core, 2, queries=tokens, dtype=torch.float32))


def test_other_numbers_of_keys_are_refused() -> None:
    core = HaloAttention(4)
    with pytest.raises(OptionError, match='9 queries and 4 keys'):
        core(*inputs(core, 2, queries=9, keys=4, dtype=torch.float32))


def test_memory_is_linear_in_tokens() -> None:
    core = HaloAttention(8, block_size=4, halo_size=1)
    largest = []
    for side in (16, 32):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            core(*inputs(core, 1, queries=side * side, dtype=torch.float32))
        largest.append(max(event.cpu_memory_usage for event in profile.events() or []))
    assert largest[1] < 4.2 * largest[0]


@pytest.mark.parametrize(('options', 'message'), [
    (dict(block_size=0), 'block_size=0'),
    (dict(halo_size=-1), 'halo_size=-1'),
    (dict(num_prefix_tokens=1.5), 'num_prefix_tokens=1.5'),
    (dict(grid_size=14), r'grid_size=14.*grid_size=\(14, 14\)'),
    (dict(grid_size=(14,)), r'grid_size=\(14,\)'),
    (dict(grid_size=(14, 0)), 'grid_size=0'),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HaloAttention(8, **options)


@pytest.mark.parametrize(('height', 'width', 'block', 'halo'), [(4, 6, 2, 1), (5, 3, 2, 2), (1, 7, 8, 3), (3, 3, 1, 0)])
def test_blocks_and_windows_show_the_tokens_around(height: int, width: int, block: int, halo: int) -> None:
    grid = BlockGrid(height, width, block, halo)
    tokens = torch.arange(1.0, height * width + 1).view(1, -1, 1)
    assert torch.equal(grid.tokens(grid.blocks(tokens)), tokens)
    windows = grid.windows(tokens, fill=-1.0)
    side = block + 2 * halo
    columns = -(-width // block)
    assert windows.shape == (1, -(-height // block) * columns, side * side, 1)
    for index, window in enumerate(windows[0, :, :, 0]):
        top, left = index // columns * block - halo, index % columns * block - halo
        expected = [
            float(y * width + x + 1) if 0 <= y < height and 0 <= x < width else -1.0
            for y in range(top, top + side)
            for x in range(left, left + side)
        ]
        assert window.tolist() == expected
