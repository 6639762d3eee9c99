"""What a comparison tells and what it does not, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sem_timm.comparison.log import way_on
from sem_timm.comparison.result import ComparisonResult, RowResult
from sem_timm.comparison.runs import Search
from sem_timm.comparison.statistics import CONFIDENCE, MOST_SEEDS, Difference, told_together


def points(value: float) -> str:
    """A difference of accuracies in points, with its sign."""
    text = f'{100 * value:+.2f}'
    return text.replace('-', '−') if float(text) else '±0.00'


def conclude(result: ComparisonResult) -> Iterator[str]:
    """The sentences, the most important first."""
    compared = [row for row in result.rows if row.difference is not None]
    base = result[result.baseline]
    if base.mean is None:
        yield f'{base.name} has no finished run; without it nothing can be compared.'
    for row in compared:
        if row.mean is not None and base.mean is not None:
            yield _told(row, base)
    yield from _best(result)
    yield from _provisos(result, compared)
    yield from _failures(result)


def _told(row: RowResult, base: RowResult) -> str:
    found = row.difference
    assert found is not None
    if found.mean is None:
        return f'{row.name} and {base.name} have no seed in common.'
    if found.low is None or found.high is None:
        return (
            f'{row.name} is {points(found.mean)} points from {base.name} with the one seed that both have. There is no '
            'interval, and one seed tells nothing; give at least --seeds 3.'
        )
    within = f'{points(found.mean)} points, 95 % interval {points(found.low)} to {points(found.high)}'
    seeds = f'{found.num_pairs} seeds'
    if found.is_told:
        return f'{row.name} is {"better" if found.mean > 0 else "worse"} than {base.name}: {within}, {seeds}.'
    return f'{row.name} cannot be told apart from {base.name}: {within}, {seeds}. {_needed(found)}'


def _needed(found: Difference) -> str:
    if found.mean == 0:
        return 'There is no difference that more seeds would show.'
    if found.needed is None:
        return f'To show a difference of this size would take more than {MOST_SEEDS:,} seeds.'
    if found.needed <= found.num_pairs:
        return 'It is about as large as shows four times out of five with so many; some more seeds may settle it.'
    return (
        f'A difference of this size takes about {found.needed} seeds, {found.needed - found.num_pairs} more, to show '
        'four times out of five.'
    )


def _best(result: ComparisonResult) -> Iterator[str]:
    """How the row with the highest mean stands to the others than the baseline."""
    ranked = [row for row in result.rows if row.mean is not None and len(row.accuracies) > 1]
    if len(ranked) < 3:
        return
    best = max(ranked, key=lambda row: row.mean or 0.0)
    level = [row.name for row in ranked if row.mean == best.mean]
    if len(level) > 1:
        yield f'The highest mean is the same for {" and ".join(level)}.'
        return
    others = [result.difference(best.name, row.name) for row in ranked if row is not best]
    told = {difference.other for difference in told_together(others)}
    apart, close = ([one.other for one in others if (one.other in told) is wanted] for wanted in (True, False))
    from_which = f'told apart from {", ".join(apart)}' if apart else 'told apart from none of the others'
    rest = f'; not from {", ".join(close)}' if apart and close else ''
    yield (
        f'The highest mean is that of {best.name}, {from_which}{rest}. As it is the highest of {len(ranked)}, '
        "this asks for more than an interval without zero: Holm's procedure."
    )


def _provisos(result: ComparisonResult, compared: list[RowResult]) -> Iterator[str]:
    intervals = sum(row.difference is not None and row.difference.low is not None for row in compared)
    if intervals > 1:
        chance = 1 - CONFIDENCE**intervals
        yield (
            f'Each interval is right 19 times out of 20; with {intervals} of them, at least one is wrong in up to '
            f'{chance:.0%} of such tables.'
        )
    base = result[result.baseline].mean
    number = result.num_images[1]
    if intervals and base is not None and number:
        error = math.sqrt(max(base * (1 - base), 1 / number) / number)
        yield (
            f'Intervals are over seeds, on these {number:,} validation images; as a sample of all images they fix an '
            f'accuracy to ±{100 * error:.1f} points (one standard error), the same images for all rows.'
        )


def _failures(result: ComparisonResult) -> Iterator[str]:
    for row in result.rows:
        if row.refused is not None:
            yield f'{row.name} was not run: {row.refused}'
        if row.diverged:
            seed, reason = next(iter(row.diverged.items()))
            total = len(row.diverged) + len(row.accuracies)
            yield (
                f'{row.name} diverged in {len(row.diverged)} of {total} runs, which are in no mean: seed {seed}, '
                f'{reason}. In a new comparison a lower --lr, or --clip 1, may help all rows alike.'
            )
        if row.diverged_tries:
            yield f'{row.name} diverged in {row.diverged_tries} tries of the search.'
        if result.search is not None and row.lr is not None:
            yield from _at_an_end(row, result.search)
    bad_images = max((row.bad_images for row in result.rows), default=0)
    if bad_images:
        yield f'Images that could not be read and were left out: up to {bad_images} in a run.'
    if len(result.versions) > 1:
        versions = '; '.join(result.versions)
        yield f'Runs were made with different versions, {versions}: those of one seed may differ in more than the row.'
    for run, why in result.too_large.items():
        yield f'{run} was left out: {why}. It is tried again wherever the comparison goes on.'
    if result.num_pending:
        yield (
            f'Runs that are still to be done: {result.num_pending}; sem-timm compare {way_on(result.folder)}, unless '
            'another process is about them.'
        )
    if result.num_damaged:
        yield f'Lines of the log that could not be read: {result.num_damaged}. Runs among them were done again.'
    for name, number in result.without_row.items():
        yield (
            f'{number} run{"s" * (number != 1)} of {name!r} not shown, as the line of the log that says what that row '
            f'is, is damaged. Add it as it was asked for: sem-timm compare {way_on(result.folder)} --operations ..., '
            'with the --train and --target that it had.'
        )


def _at_an_end(row: RowResult, search: Search) -> Iterator[str]:
    lrs = search.lrs
    if row.diverged_tries == len(lrs) * len(search.seeds):  # none did best
        return
    if len(lrs) > 1 and row.lr in (min(lrs), max(lrs)):
        way = 'lowest' if row.lr == min(lrs) else 'highest'
        yield f'{row.name} does best with the {way} learning rate that was tried, {row.lr:g}; others may be better.'
