"""Mean and standard deviation of a stream, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running mean and variance of rows of numbers, in float64.

    Batches are merged by their own means and sums of squared deviations, so that nothing is lost where the mean is
    large beside the spread; T. F. Chan, G. H. Golub, R. J. LeVeque, 1979.

    Args:
        width: Numbers in a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Take in rows (B, width)."""
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        before, self.count = self.count, self.count + len(rows)
        difference = mean - self.mean
        self.mean = self.mean + difference * (len(rows) / self.count)
        self._squares += (rows - mean).square().sum(0) + difference.square() * (before * len(rows) / self.count)

    @property
    def std(self) -> Tensor:
        """Standard deviation of all rows so far (width,), of the population: 0 for a single row."""
        return (self._squares / max(self.count, 1)).sqrt()
