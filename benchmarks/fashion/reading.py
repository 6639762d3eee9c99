"""What a table of accuracies allows to say, differences within the spread over seeds being called so."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One variant in one table.

    Attributes:
        name: Its name on the command line.
        title: What it is.
        parameters: Number of parameters that are trained.
        accuracies: Percent by seed.
    """

    name: str
    title: str
    parameters: int
    accuracies: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.accuracies.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    def against(self, other: Line) -> float | None:
        """Mean difference to another variant over the seeds that both have; None without one."""
        seeds = self.accuracies.keys() & other.accuracies.keys()
        return statistics.mean(self.accuracies[s] - other.accuracies[s] for s in seeds) if seeds else None


def noise(lines: list[Line]) -> tuple[float, float] | None:
    """The standard deviation over seeds, pooled over the variants, and twice the standard error of a difference.

    None where no variant has two seeds.
    """
    repeated = [line for line in lines if line.spread is not None]
    if not repeated:
        return None
    weights = [len(line.accuracies) - 1 for line in repeated]
    pooled = math.sqrt(sum(w * line.spread**2 for w, line in zip(weights, repeated)) / sum(weights))
    seeds = min(len(line.accuracies) for line in lines)
    return pooled, 2 * pooled * math.sqrt(2 / seeds)


def reading(original: str, lines: list[Line]) -> str:
    """What a table allows to say, differences within the noise being called so."""
    measured = noise(lines)
    base = next((line for line in lines if line.name == original), None)
    if measured is None:
        return 'One seed: how much a repetition would differ is not known, so no difference here means anything.'
    pooled, threshold = measured
    counts = sorted({len(line.accuracies) for line in lines})
    text = (
        f'Repetitions differ: the standard deviation over seeds, pooled over the {len(lines)} variants, is '
        f'{pooled:.2f} points. Two means of {counts[0]} seed{"s" * (counts[0] > 1)} are told apart here only if they '
        f'differ by more than {threshold:.2f} points, two standard errors of a difference.'
    )
    if len(counts) > 1:
        text += f' Not all variants have {counts[-1]} seeds yet.'
    return text if base is None else f'{text} {_comparison(base, lines, threshold)}'


def _comparison(base: Line, lines: list[Line], threshold: float) -> str:
    differences = {line.title: line.against(base) for line in lines if line is not base}
    known: dict[str, Any] = {title: value for title, value in differences.items() if value is not None}
    groups = {
        'better': [title for title, value in known.items() if value > threshold],
        'worse': [title for title, value in known.items() if value < -threshold],
        'not told apart from it': [title for title, value in known.items() if abs(value) <= threshold],
    }
    clauses = [
        f'- {verdict}: {"; ".join(f"*{title}*" for title in titles)}.' for verdict, titles in groups.items() if titles
    ]
    return '\n'.join([f'Against *{base.title}* that leaves', '', *clauses])


def order(lines: list[Line]) -> str:
    """The variants from best to worst, beside what was published for the same kind of network."""
    ordered = sorted(lines, key=lambda line: -line.mean)
    return (
        f'From best to worst: {", ".join(f"*{line.title}* {line.mean:.2f}" for line in ordered)}. The authors of SEM '
        'print for ResNet-164 on CIFAR-100, after 164 epochs: IE 77.09, SEM 76.76, SE 75.03, plain 74.30.'
    )


def longer_trained(lines: list[Line], longer: Line) -> list[str]:
    """Whether the trainings are long enough, as far as the original tells."""
    base = next((line for line in lines if line.name == longer.name), None)
    difference = None if base is None else longer.against(base)
    if base is None or difference is None:
        return []
    seeds = sorted(base.accuracies.keys() & longer.accuracies.keys())
    accuracies = ', '.join(f'{longer.accuracies[seed]:.2f}' for seed in seeds)
    return [
        f'With twice as many epochs *{base.title}* reaches {accuracies} (seed {", ".join(map(str, seeds))}), '
        f'{difference:+.2f} points.\n'
    ]
