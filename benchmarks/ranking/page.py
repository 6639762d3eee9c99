"""The page of where a gate helps: gains of each block, what rankings tell of them, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from common.run_log import Record
from ranking.statistics import Values, advantage, agreement, spearman

HEAD_ALONE, GRADIENTS = 'head alone', 'gradients'

# The outcomes of a training: their title, the column of the log, and the sign that makes more better.
OUTCOMES = {
    'validation loss': ('loss', -1.0),
    'accuracy': ('accuracy', 1.0),
    'validation loss, head fitted again': ('refitted_loss', -1.0),
}
MAIN = 'validation loss'
LITERAL = 'norm over spread, own head'
DEPTH = 'depth: the later the better'
TRIVIAL = (DEPTH, 'depth: the earlier the better')
FIRST_EPOCH = 'loss over the first epoch of the same training'


@dataclass(frozen=True)
class Trained:
    """All that is known of one set in one setting, by seed, over the sites in the order of depth."""

    name: str
    setting: str
    sites: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: Values
    rows: dict[tuple[int, str], Record]
    scores: dict[int, dict[str, dict[str, float]]]

    def gains(self, outcome: str, seed: int) -> Values:
        """What each site won over the head alone, with one seed."""
        column, sign = OUTCOMES.get(outcome, (outcome, -1.0))
        alone = self.rows[seed, HEAD_ALONE][column]
        return np.array([sign * (self.rows[seed, site][column] - alone) for site in self.sites])

    def gain(self, outcome: str) -> Values:
        """The mean over seeds."""
        return np.mean([self.gains(outcome, seed) for seed in self.seeds], axis=0)

    def score(self, name: str) -> Values:
        """A score of the gradients, the mean over seeds."""
        return np.mean([[self.scores[seed][name][site] for site in self.sites] for seed in self.seeds], axis=0)

    def rankings(self, chosen: str) -> dict[str, Values]:
        """What the page compares, by title."""
        depth = np.arange(len(self.sites), dtype=float)
        return {
            f'gradient: {LITERAL}': self.score(LITERAL),
            f'gradient: {chosen} (chosen)': self.score(chosen),
            TRIVIAL[0]: depth,
            TRIVIAL[1]: -depth,
            FIRST_EPOCH: self.gain('first_epoch'),
        }

    def agreement_of_seeds(self, outcome: str) -> float | None:
        """Rank correlation of the gains of two seeds, the mean over pairs; None with one seed."""
        pairs = [(a, b) for a in self.seeds for b in self.seeds if a < b]
        found = [spearman(self.gains(outcome, a), self.gains(outcome, b)) for a, b in pairs]
        return fmean(found) if found else None


def trained(records: Sequence[Record], setting: str, name: str) -> Trained:
    """What a log says of one set in one setting; only seeds that are finished count."""
    own = [row for row in records if row['setting'] == setting and row['set'] == name]
    rows = {(row['seed'], row['site']): row for row in own}
    sites = tuple(sorted({site for _, site in rows} - {HEAD_ALONE, GRADIENTS}))
    seeds = sorted({seed for seed, _ in rows})
    whole = tuple(s for s in seeds if all((s, site) in rows for site in (*sites, HEAD_ALONE, GRADIENTS)))
    if not whole:
        raise SystemExit(f'{name}, {setting}: no seed is finished yet.')
    parameters = np.array([float(rows[whole[0], site]['parameters']) for site in sites])
    scores = {seed: rows[seed, GRADIENTS]['scores'] for seed in whole}
    return Trained(name, setting, sites, whole, parameters, rows, scores)


def best_score(data: Trained) -> str:
    """The score whose ranking goes best with the gains of a set."""
    gain = data.gain(MAIN)
    return max(data.scores[data.seeds[0]], key=lambda name: spearman(data.score(name), gain))


def gains_table(sets: Sequence[Trained]) -> str:
    """Gains of each block, mean over seeds, and in brackets those of each seed."""
    titles = [f'{data.name}, {outcome}' for data in sets for outcome in ('validation loss', 'accuracy')]
    lines = ['| block | parameters | ' + ' | '.join(titles) + ' |', '|---|---:|' + '---:|' * len(titles)]
    for number, site in enumerate(sets[0].sites):
        cells = []
        for data in sets:
            for outcome, form in (('validation loss', '+.3f'), ('accuracy', '+.1f')):
                each = [data.gains(outcome, seed)[number] for seed in data.seeds]
                seeds = ', '.join(f'{value:{form}}' for value in each)
                cells.append(_minus(f'{fmean(each):{form}} ({seeds})'))
        lines.append(f'| `{site}` | {int(sets[0].parameters[number]):,} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def rankings_table(data: Trained, chosen: str, outcome: str) -> str:
    """How each ranking goes with the gains of one set."""
    gain = data.gain(outcome)
    lines = [
        '| ranking by | Spearman | 95 % interval | p | Kendall | beyond depth | of the best |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for title, score in data.rankings(chosen).items():
        found = agreement(score, gain)
        cells = [
            f'{found.spearman:+.2f}',
            f'{found.low:+.2f} to {found.high:+.2f}',
            '< 0.001' if found.p < 0.001 else f'{found.p:.3f}',
            *(f'{value:+.2f}' for value in (found.kendall, found.beyond_depth, found.of_best)),
        ]
        lines.append(f'| {title} | {_minus(" | ".join(cells))} |')
    return '\n'.join(lines)


def with_sign(value: float) -> str:
    """A number with two decimals and its sign."""
    return _minus(f'{value:+.2f}')


def _minus(text: str) -> str:
    return text.replace('-', '−')


def has_earned_a_command(data: Trained, score: str) -> bool:
    """The rule: told from chance, and above both orders of depth, on a set that nothing was chosen on."""
    gain, ranking = data.gain(MAIN), data.score(score)
    found = agreement(ranking, gain)
    depth = np.arange(len(gain), dtype=float)
    best_trivial = max((depth, -depth), key=lambda other: spearman(other, gain))
    return found.low > 0 and found.p < 0.05 and advantage(ranking, best_trivial, gain)[1] > 0
