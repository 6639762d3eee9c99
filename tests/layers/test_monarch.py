"""Monarch attention: its formula block by block, where it is softmax attention, its grids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.block_grid import Tiles
from sem_timm.layers.monarch import MonarchAttention
from tests.layers.attention_inputs import both_modes, close, inputs


def written_out(core: MonarchAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One head, one sample: the outputs query by query, with what a mask (N,) adds to the logits of keys."""
    tiles, first, scale = core.tiles(len(q)), core.num_prefix_tokens, core.head_dim**-0.5
    assert tiles is not None
    rows, columns = -(-tiles.height // tiles.tile_height), -(-tiles.width // tiles.tile_width)
    blocks: list[list[int | None]] = []
    for row in range(rows):
        for column in range(columns):
            places = [divmod(place, tiles.tile_width) for place in range(tiles.area)]
            at = [(row * tiles.tile_height + y, column * tiles.tile_width + x) for y, x in places]
            inside = [y < tiles.height and x < tiles.width for y, x in at]
            blocks.append([first + y * tiles.width + x if there else None for (y, x), there in zip(at, inside)])

    def seen(token: int | None) -> bool:
        return token is not None and mask[token] > -1e3

    def asks(block: list[int | None], token: int | None) -> Tensor:
        if token is not None and seen(token):
            return q[token]
        others = [q[other] for other in block if other is not None and seen(other)]
        return torch.stack(others).mean(0) if others else torch.zeros_like(q[0])

    outputs = {token: torch.softmax(scale * k @ q[token] + mask, 0) @ v for token in range(first)}
    asking = [[asks(block, token) for token in block] for block in blocks]
    for _ in range(core.passes):
        after = [list(queries) for queries in asking]
        for place in range(tiles.area):
            keys, values, offsets = list(k[:first]), list(v[:first]), list(mask[:first])
            for block, queries in zip(blocks, asking):
                inside = [token for token in block if token is not None]
                weights = torch.softmax(scale * k[inside] @ queries[place] + mask[inside], 0)
                keys.append(weights @ k[inside])
                values.append(weights @ v[inside])
                offsets.append(weights @ mask[inside] - torch.special.xlogy(weights, weights).sum())
            attended = {}
            for token in (block[place] for block in blocks):
                if token is not None:
                    logits = scale * torch.stack(keys) @ q[token] + torch.stack(offsets)
                    attended[token] = torch.softmax(logits, 0)
                    outputs[token] = attended[token] @ torch.stack(values)
            counted = [token for token in attended if seen(token)]
            for number in range(len(blocks)):
                weights = torch.stack([attended[token][first + number] for token in counted] or [q.new_zeros(())])
                total = weights.sum()
                after[number][place] = (
                    weights @ q[counted] / total if total > 1e-12 else torch.zeros_like(after[number][place])
                )
        asking = after
    return torch.stack([outputs[token] for token in range(len(q))])


@pytest.mark.parametrize(('grid', 'block', 'prefix', 'passes'), [
    ((4, 6), None, 1, 1), ((5, 3), None, 0, 2), ((3, 7), (3, 1), 2, 3), ((5, 6), 2, 1, 1), ((4, 5), (3, 2), 5, 2),
    ((7, 3), (2, 9), 0, 1), ((1, 8), (1, 3), 1, 2), ((6, 1), 4, 0, 3), ((3, 3), 1, 1, 2),
])  # fmt: skip
@pytest.mark.parametrize('masked', ['', 'hidden', 'added'])
def test_output_follows_the_equations_block_by_block(
    grid: tuple[int, int], block: Any, prefix: int, passes: int, masked: str
) -> None:
    core = MonarchAttention(5, 3, block_size=block, passes=passes, grid_size=grid, num_prefix_tokens=prefix)
    count = prefix + grid[0] * grid[1]
    q, k, v = inputs(core, 2, 2, queries=count)
    q = 3 * q  # so that weights differ
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(2, 1, 1, count, generator=generator) > 0.3
    numbers = torch.randn(2, 1, 1, count, generator=generator, dtype=torch.float64)
    given = {'': None, 'hidden': keep, 'added': numbers}[masked]
    plain = numbers if masked == 'added' else torch.zeros_like(numbers).masked_fill(~keep, -3e4 if masked else 0.0)
    for out in both_modes(lambda: core(q, k, v, attn_mask=given)):
        for sample in range(2):
            for head in range(2):
                at = (sample, head)
                close(out[at], written_out(core, q[at], k[at], v[at], plain[sample, 0, 0]).detach())


@pytest.mark.parametrize('prefix', [0, 1, 4])
@pytest.mark.parametrize('passes', [1, 2, 3])
@pytest.mark.parametrize('block', [1, (5, 4), 9])
@pytest.mark.parametrize('masked', [False, True])
def test_blocks_of_one_token_and_one_block_are_softmax_attention(
    prefix: int, passes: int, block: Any, masked: bool
) -> None:
    core = MonarchAttention(6, 4, block_size=block, passes=passes, grid_size=(5, 4), num_prefix_tokens=prefix)
    q, k, v = inputs(core, 2, 3, queries=20 + prefix)
    keep = torch.arange(20 + prefix) % 5 > 0 if masked else torch.ones(20 + prefix, dtype=torch.bool)
    logits = (q @ k.mT / 6**0.5).masked_fill(~keep, -torch.inf)
    out = core(q, k, v, attn_mask=keep.view(1, 1, 1, -1) if masked else None)
    expected = torch.softmax(logits, -1) @ v
    torch.testing.assert_close(out[..., keep, :], expected[..., keep, :], rtol=0, atol=1e-12)


def test_rows_and_columns_that_attend_apart_are_exact() -> None:
    """Logits that are a sum of one for the row and one for the column: blocks answer all queries of a place alike."""
    height, width = 4, 5
    core = MonarchAttention(height + width, grid_size=(height, width))
    generator = torch.Generator().manual_seed(0)
    k = torch.cat([x.flatten(0, 1) for x in (
        torch.eye(height, dtype=torch.float64)[:, None].expand(-1, width, -1),
        torch.eye(width, dtype=torch.float64)[None].expand(height, -1, -1),
    )], -1)  # fmt: skip
    # The logits of a query depend on its row for rows of keys, and on its column for columns of keys.
    of_rows = torch.randn(height, 1, height, generator=generator, dtype=torch.float64).expand(-1, width, -1)
    of_columns = torch.randn(1, width, width, generator=generator, dtype=torch.float64).expand(height, -1, -1)
    q = 5 * torch.cat((of_rows, of_columns), -1).flatten(0, 1)
    v = torch.randn(height * width, height + width, generator=generator, dtype=torch.float64)
    close(core(q, k, v), torch.softmax(q @ k.mT / (height + width) ** 0.5, -1) @ v)


def test_more_passes_come_closer_where_queries_differ() -> None:
    """What blocks are asked is fitted to who reads the answer, so that the bound on softmax gets tighter."""
    errors = []
    for passes in (1, 4):
        core = MonarchAttention(8, grid_size=(6, 6), passes=passes)
        q, k, v = (2 * x for x in inputs(core, 16, queries=36))
        exact = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        errors.append(float((core(q, k, v) - exact).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('prefix', [0, 1])
def test_gradients(passes: int, prefix: int) -> None:
    core = MonarchAttention(2, block_size=2, passes=passes, grid_size=(3, 2), num_prefix_tokens=prefix)
    arguments = [x.requires_grad_() for x in inputs(core, 1, queries=6 + prefix)]
    mask = torch.arange(6 + prefix) != 3
    for given in (None, mask):
        assert torch.autograd.gradcheck(lambda *x, given=given: core(*x, attn_mask=given), arguments)
        if not prefix:  # the fused kernel that prefix tokens attend by has no second derivative on a CPU
            assert torch.autograd.gradgradcheck(lambda *x, given=given: core(*x, attn_mask=given), arguments)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision(dtype: torch.dtype) -> None:
    core = MonarchAttention(64, grid_size=(8, 8), num_prefix_tokens=1, passes=2)
    q, k, v = (x.to(dtype) for x in inputs(core, 2, 2, queries=65))
    q = 20 * q
    expected = core(*(x.double() for x in (q, k, v)))
    given = core(q, k, v)
    assert given.dtype == dtype
    error = (given.double() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1  # logits of fifty have a rounding of a fifth in bfloat16


def test_memory_grows_with_the_root_of_tokens() -> None:
    largest = []
    for side in (16, 32):
        core = MonarchAttention(8, grid_size=(side, side))
        arguments = inputs(core, 1, queries=side * side, dtype=torch.float32)
        with torch.no_grad(), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:  # fmt: skip
            core(*arguments)
        largest.append(max(event.cpu_memory_usage for event in profile.events() or []))
    assert largest[1] < 8.2 * largest[0]


def test_any_square_runs_beside_the_grid_given() -> None:
    core = MonarchAttention(4, grid_size=[3, 12], num_prefix_tokens=1)
    assert core.tiles(37) == Tiles(3, 12, 1, 12) and core.tiles(50) == Tiles(7, 7, 1, 7)
    assert MonarchAttention(4, block_size=4).tiles(9) == Tiles(3, 3, 3, 3)
    assert MonarchAttention(4, block_size=(1, 4)).tiles(36) == Tiles(6, 6, 1, 4)
    assert core(*inputs(core, 2, queries=26, dtype=torch.float32)).shape == (2, 26, 4)
    assert 'block_size=(1, 4), passes=1' in repr(MonarchAttention(4, block_size=[1, 4]))


@pytest.mark.parametrize('tokens', [1, 38, 51])
def test_tokens_that_form_no_grid_attend_as_before(tokens: int) -> None:
    core = MonarchAttention(4, grid_size=(3, 12), num_prefix_tokens=1)
    assert core.tiles(tokens) is None
    q, k, v = inputs(core, 2, queries=tokens)
    keep = torch.arange(tokens) % 5 != 1
    logits = q @ k.mT / 2
    close(core(q, k, v), torch.softmax(logits, -1) @ v)
    masked = core(q, k, v, attn_mask=keep.view(1, 1, -1))
    close(masked, torch.softmax(logits.masked_fill(~keep, -torch.inf), -1) @ v)


def test_other_numbers_of_keys_are_refused() -> None:
    core = MonarchAttention(4)
    with pytest.raises(OptionError, match='9 queries and 4 keys'):
        core(*inputs(core, 2, queries=9, keys=4, dtype=torch.float32))


@pytest.mark.parametrize(('options', 'message'), [
    (dict(block_size=0), 'block_size=0'),
    (dict(block_size=(2, 0)), 'block_size=0'),
    (dict(block_size=(2, 3, 4)), r'block_size=\(2, 3, 4\).*height and width'),
    (dict(block_size=()), r'block_size=\(\).*height and width'),
    (dict(block_size=2.5), 'block_size=2.5.*height and width'),
    (dict(block_size='rows'), "block_size='rows'.*height and width"),
    (dict(passes=0), 'passes=0'),
    (dict(passes=1.5), 'passes=1.5'),
    (dict(num_prefix_tokens=-1), 'num_prefix_tokens=-1'),
    (dict(grid_size=14), r'grid_size=14.*grid_size=\(14, 14\)'),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonarchAttention(8, **options)


@pytest.mark.parametrize(('height', 'width', 'tile'), [
    (4, 6, (4, 1)), (4, 6, (1, 6)), (5, 3, (2, 2)), (3, 7, (2, 3)), (1, 1, (1, 1))
])  # fmt: skip
def test_tiles_hold_the_tokens_of_their_place(height: int, width: int, tile: tuple[int, int]) -> None:
    tiles = Tiles(height, width, *tile)
    tokens = torch.arange(1.0, 2 * height * width + 1).view(2, 1, -1, 1)
    cut = tiles.cut(tokens, 2 * tokens, fill=-1.0)
    columns = -(-width // tile[1])
    assert cut.shape == (-(-height // tile[0]) * columns, 2, math.prod(tile), 2) and cut.is_contiguous()
    assert torch.equal(tiles.join(cut.flatten(1, 2).transpose(0, 1), (2, 1))[..., :1], tokens)
    for index, (first, double) in enumerate(zip(*cut[:, 0].unbind(-1))):
        top, left = index // columns * tile[0], index % columns * tile[1]
        expected = [
            float(y * width + x + 1) if y < height and x < width else -1.0
            for y in range(top, top + tile[0])
            for x in range(left, left + tile[1])
        ]
        assert first.tolist() == expected
        assert double.tolist() == [2 * number if number > 0 else -1.0 for number in expected]
