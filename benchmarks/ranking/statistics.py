"""How well one order of the sites tells another: rank correlations, their chances, and what is lost by following it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

Values = NDArray[np.float64]

NUM_DRAWS = 10_000


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
    return float(_each(first[None], second[None])[0])


def _each(first: Values, second: Values) -> Values:
    """Rank correlation of each row of one matrix with that of another."""
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(first, axis=1), rankdata(second, axis=1)))
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def agreement(score: Values, gain: Values, seed: int = 0) -> Agreement:
    """How a score of sites, in the order of depth, goes with their gains."""
    generator = np.random.default_rng(seed)
    number = len(score)
    observed = spearman(score, gain)
    shuffled = _each(np.tile(score, (NUM_DRAWS, 1)), generator.permuted(np.tile(gain, (NUM_DRAWS, 1)), axis=1))
    drawn = generator.integers(number, size=(NUM_DRAWS, number))
    resampled = _each(score[drawn], gain[drawn])
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
    drawn = np.random.default_rng(seed).integers(len(gain), size=(NUM_DRAWS, len(gain)))
    found = _each(score[drawn], gain[drawn]) - _each(other[drawn], gain[drawn])
    low, high = np.quantile(found, [0.025, 0.975])
    return spearman(score, gain) - spearman(other, gain), float(low), float(high)


def _without_depth(values: Values) -> Values:
    ranks, depth = rankdata(values), np.arange(len(values))
    # Rounded, so that nothing is left of a ranking by depth but zeros.
    return np.round(ranks - np.polyval(np.polyfit(depth, ranks, 1), depth), 9)
