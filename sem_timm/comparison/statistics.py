"""Means, spreads, and what can be told from pairs of runs: Student's t on the differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from scipy.special import nctdtr, stdtr, stdtrit

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """How much higher the accuracy of one row is than that of another, over seeds that both have.

    Attributes:
        row: The one.
        other: The other.
        num_pairs: Seeds that both have finished.
        mean: Mean of the differences of accuracies, from -1 to 1; None without pairs.
        spread: Standard deviation of the differences over seeds; None for less than two pairs.
        low: Lower end of the 95 % interval of the mean; None for less than two pairs.
        high: Upper end.
        needed: How many seeds, these included, it takes so that a difference of this size and spread shows four times
            out of five; None if that is more than `MOST_SEEDS`, or cannot be told.
    """

    row: str
    other: str
    num_pairs: int
    mean: float | None = None
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    needed: int | None = None

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def p_value(self) -> float:
        """That of the two-sided paired t test; 1 where there is none."""
        if self.mean is None or not self.spread:
            return 1.0
        statistic = abs(self.mean) / self.spread * math.sqrt(self.num_pairs)
        return 2 * float(stdtr(self.num_pairs - 1, -statistic))


def compare_pairs(row: str, other: str, first: Sequence[float], second: Sequence[float], num_images: int) -> Difference:
    """The difference of two rows from accuracies of the same seeds.

    An accuracy over N images is a multiple of 1 / N. So the standard deviation of a difference is not taken to be below
    that of two numbers rounded to it: a few seeds that happen to agree to the image are no proof.

    Args:
        row: Name of the one.
        other: Name of the other.
        first: Accuracies of the one, from 0 to 1.
        second: Accuracies of the other, of the same seeds in the same order.
        num_images: Images that accuracies were measured on.
    """
    differences = [a - b for a, b in zip(first, second)]
    number = len(differences)
    if number < 2:
        return Difference(row, other, number, differences[0] if differences else None)
    mean = statistics.fmean(differences)
    spread = max(statistics.stdev(differences), math.sqrt(2 / 12) / num_images)
    half = half_width(spread, number)
    return Difference(row, other, number, mean, spread, mean - half, mean + half, needed_pairs(mean, spread))


def told_together(differences: Sequence[Difference]) -> list[Difference]:
    """Those that are told with 5 % for a mistake in all of them together, by Holm's procedure."""
    ordered = sorted(differences, key=lambda difference: difference.p_value)
    limits = [(1 - CONFIDENCE) / (len(ordered) - number) for number in range(len(ordered))]
    pairs = zip(ordered, limits)
    return [difference for difference, _ in takewhile(lambda pair: pair[0].p_value <= pair[1], pairs)]


def half_width(spread: float, number: int) -> float:
    """Half of the 95 % interval of a mean of ``number`` values with a standard deviation."""
    return float(stdtrit(number - 1, (1 + CONFIDENCE) / 2)) * spread / math.sqrt(number)


def needed_pairs(mean: float, spread: float) -> int | None:
    """The least number of pairs for which a paired t test finds a difference with a power of 80 %.

    Args:
        mean: The difference.
        spread: Its standard deviation over pairs.

    Returns:
        The number, from the noncentral t distribution; None if it is above `MOST_SEEDS`.
    """
    effect = abs(mean) / spread
    return next((number for number in range(2, MOST_SEEDS + 1) if _power(effect, number) >= POWER), None)


def _power(effect: float, number: int) -> float:
    """Power of a two-sided paired t test at 5 % for a mean of so many standard deviations."""
    critical = float(stdtrit(number - 1, (1 + CONFIDENCE) / 2))
    shift = effect * math.sqrt(number)
    # Beyond some standard errors the other side has no part in it, and scipy gives no number for it.
    other_side = float(nctdtr(number - 1, shift, -critical)) if shift < 5 else 0.0
    return 1 - float(nctdtr(number - 1, shift, critical)) + other_side
