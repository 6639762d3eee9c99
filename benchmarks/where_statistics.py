"""How well one order of the sites tells another: rank correlations, their chances, and what is lost by following it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

Values = NDArray[np.float64]

NUM_DRAWS = 2_000


@dataclass(frozen=True)
class Agreement:
    """How the ranking by a score goes with the gains.

    Attributes:
        spearman: Rank correlation.
        low: Lower end of its 95 % interval, by a bootstrap over sites.
        high: Upper end of it.
        p: How often a random order of the sites agrees at least as well; one-sided.
        kendall: Kendall's tau-b.
        beyond_depth: Rank correlation of what is left of both when a straight line in depth is taken from the ranks.
        of_best: Gain of the site that the score puts first, less that of the mean site, over that of the best site less
            the mean site: 1 for the best, 0 for one that is no better than a random one.
    """

    spearman: float
    low: float
    high: float
    p: float
    kendall: float
    beyond_depth: float
    of_best: float


def spearman(first: Values, second: Values) -> float:
    """Rank correlation; 0 where one of the two is the same everywhere."""
    a, b = (rankdata(values) for values in (first, second))
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def agreement(score: Values, gain: Values, seed: int = 0) -> Agreement:
    """How a score of sites, in the order of depth, goes with their gains."""
    generator = np.random.default_rng(seed)
    number = len(score)
    observed = spearman(score, gain)
    shuffled = np.array([spearman(score, generator.permutation(gain)) for _ in range(NUM_DRAWS)])
    drawn = [generator.integers(number, size=number) for _ in range(NUM_DRAWS)]
    resampled = np.array([spearman(score[index], gain[index]) for index in drawn])
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean, best = gain.mean(), gain.max()
    return Agreement(
        spearman=observed,
        low=float(low),
        high=float(high),
        p=float((1 + (shuffled >= observed - 1e-12).sum()) / (1 + len(shuffled))),
        kendall=float(np.nan_to_num(kendalltau(score, gain).statistic)),
        beyond_depth=spearman(_without_depth(score), _without_depth(gain)),
        of_best=float((gain[int(score.argmax())] - mean) / (best - mean)),
    )


def advantage(score: Values, other: Values, gain: Values, seed: int = 0) -> tuple[float, float, float]:
    """By how much the rank correlation of a score with the gains is above that of another, with the 95 % interval."""
    generator = np.random.default_rng(seed)
    number = len(gain)
    drawn = [generator.integers(number, size=number) for _ in range(NUM_DRAWS)]
    found = [spearman(score[index], gain[index]) - spearman(other[index], gain[index]) for index in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return spearman(score, gain) - spearman(other, gain), float(low), float(high)


def _without_depth(values: Values) -> Values:
    ranks, depth = rankdata(values), np.arange(len(values))
    return ranks - np.polyval(np.polyfit(depth, ranks, 1), depth)
