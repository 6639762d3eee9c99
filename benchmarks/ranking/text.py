"""The words of the page of where a gate helps, around the tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.run_log import Record
from ranking.page import (
    LITERAL,
    MAIN,
    OUTCOMES,
    Trained,
    best_score,
    gains_table,
    has_earned_a_command,
    rankings_table,
    trained,
    with_sign,
)
from ranking.statistics import advantage, agreement

CHOOSING, CHECKING, MAIN_SETTING = 'fashion-mnist', 'digits', '1,000 images'

_INTRODUCTION = """\
# Does a gradient tell where a gate helps?

Written by `benchmarks/where.py` from [its rows](where.jsonl), whatever came out.

**Asked**: a command that ranks the blocks of a network before any training, by the gradient of the loss in the logits
of identity gates, over its spread. **Rule**: there is such a command only if, on a set of images that nothing was
chosen on, its ranking goes with what the gate of each block wins when it is trained alone (Spearman's correlation above
zero by its 95 % interval and by a permutation test at 5 %), and goes with it better than either order by depth, by the
95 % interval of the difference.

"""

_LIMITS = """
This is weak evidence, from one network, one operation and few seeds: eleven blocks leave wide intervals, and most gains
are small. It does not show that no gradient tells where a gate helps; it shows none that a command could stand on. To
know which place is best, `sem-timm compare` trains them.
"""

_SETUP = """
## What was done

tf_efficientnet_lite0 with its ImageNet weights, frozen, norms in evaluation mode, 64 px. An SE gate at one block, an
identity at first, is trained together with a new head, a multinomial logistic regression with a penalty of {decay:g} on
its weights: {settings}
(digits have 997). The first was made first; as hardly any gate helped there, the second has more images and a lower
rate. Adam, {head_rate:g} for the head, rates falling to zero; no augmentation. Penalty and rates come from a few trials
before, which were judged on validation images. Sites: the {sites} blocks from `{first}` on; those before take most
of the time. A gain is what a gate wins over the head alone, with the same images in the same order, on {validation}
other images, which are the same for all seeds. The main outcome is the validation loss after the last epoch.

Scores take the gradient of each image's loss in the logits of all gates, over the training images, with a head that is
fitted to its optimum: on the same images (own), or on other ones (held out, four folds). *Norm over spread* is the root
of the sum over channels of mean² / variance. *Gain* is what a step wins at first order on images that it was not made
of, over the length of the step; *gain over spread* is that over its root mean square over images. Steps: the mean
gradient (constant), the same over the second moments of all channels (natural), the step of gradient descent in the
last layer of the gate (gate), and a ridge regression of the gradient on the pooled features (ridge). All {tried} scores
were tried on {choosing} with 1,000 images; the best there was checked on {checking}.
"""

_COLUMNS = """
Spearman and Kendall: rank correlation with the gains, both means over seeds. Interval: bootstrap over {sites} sites. p:
how often a random order does as well, one-sided. Beyond depth: what is left of the correlation when a straight line
in depth is taken from both ranks. Of the best: gain of the block that the ranking puts first, where 0 is the mean block
and 1 the best one.
"""


def page(records: Sequence[Record], facts: dict[str, str | int | float]) -> str:
    """The page, from the rows of a log.

    Args:
        records: The rows.
        facts: Numbers of the set-up, for the text.
    """
    settings = list(dict.fromkeys(row['setting'] for row in records))
    found = {
        (setting, name): data
        for setting in settings
        for name in (CHOOSING, CHECKING)
        if (data := trained(records, setting, name)).seeds
    }
    main = {name: found[MAIN_SETTING, name] for name in (CHOOSING, CHECKING)}
    chosen = best_score(main[CHOOSING])
    tried = len(main[CHOOSING].scores[main[CHOOSING].seeds[0]])
    words = {'tried': tried, 'sites': len(main[CHOOSING].sites), 'choosing': CHOOSING, 'checking': CHECKING, **facts}
    parts = [_INTRODUCTION + _verdict(main, chosen), _SETUP.format_map(words)]
    for setting in dict.fromkeys(setting for setting, _ in found):
        sets = [data for (own, _), data in found.items() if own == setting]
        counts = ', '.join(f'{len(data.seeds)} of {data.name}' for data in sets)
        told = f'mean (each seed); seeds: {counts}'
        parts.append(
            f'\n## Gains, {setting}\n\nOver the head alone; accuracy in points; {told}.\n\n{gains_table(sets)}\n'
        )
        parts.append(_noise(sets))
        parts.append(f'\n## Rankings, {setting}\n{_COLUMNS.format_map(words)}')
        for data in sets:
            for outcome in OUTCOMES if setting == MAIN_SETTING else [MAIN]:
                parts.append(f'\n### {data.name}, {outcome}\n\n{rankings_table(data, chosen, outcome)}\n')
    return ''.join(parts)


def _verdict(main: dict[str, Trained], chosen: str) -> str:
    """The answer, with its numbers."""
    checked = main[CHECKING]
    gain = checked.gain(MAIN)
    sentences = []
    for title, name in (('what was asked for', LITERAL), (f'the best of what was tried on {CHOOSING}', chosen)):
        both = [agreement(data.score(name), data.gain(MAIN)) for data in main.values()]
        numbers = ' and '.join(
            f'{with_sign(one.spearman)} on {data.name} (95 % interval {with_sign(one.low)} to {with_sign(one.high)})'
            for one, data in zip(both, main.values())
        )
        difference = advantage(checked.score(name), -np.arange(len(gain), dtype=float), gain)
        against = f'{with_sign(difference[0])} ({with_sign(difference[1])} to {with_sign(difference[2])})'
        sentences.append(
            f'- The ranking by {title}, *{name}*: rank correlation with the gains {numbers}.\n'
            f'  On {CHECKING} that is {against} beside the order from the first block to the last.\n'
        )
    earned = any(has_earned_a_command(checked, name) for name in (LITERAL, chosen))
    verdict = 'One fulfils the rule.' if earned else '**None fulfils the rule, so there is no `sem-timm where`.**'
    return f'{verdict}\n\n{"".join(sentences)}{_LIMITS}'


def _noise(sets: Sequence[Trained]) -> str:
    """How well two seeds agree, which is about as well as anything could predict one of them."""
    lines = []
    for data in sets:
        told = {outcome: data.agreement_of_seeds(outcome) for outcome in OUTCOMES}
        numbers = ', '.join(f'{outcome} {with_sign(value)}' for outcome, value in told.items() if value is not None)
        if numbers:
            lines.append(f'Rank correlation between the gains of two seeds, {data.name}: {numbers}.')
    return '\n' + '\n'.join(lines) + '\n' if lines else ''
