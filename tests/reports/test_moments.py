"""Streaming moments against those of all numbers at once."""

from __future__ import annotations

import pytest
import torch

from sem_timm.reports.moments import Moments


@pytest.mark.parametrize('sizes', [[1], [7, 1, 0, 12], [20]])
@pytest.mark.parametrize('offset', [0.0, 1e7])
def test_batches_of_any_size_give_the_moments_of_all_rows(sizes: list[int], offset: float) -> None:
    rows = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    moments = Moments(3)
    for part in rows.split(sizes):
        moments.update(part)
    assert moments.count == len(rows)
    # The naive difference of squares would have no digit left at this offset.
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.std, rows.std(0, correction=0), rtol=1e-7, atol=1e-9)


def test_nothing_gives_zeros() -> None:
    assert Moments(2).count == 0 and Moments(2).std.tolist() == [0.0, 0.0]
