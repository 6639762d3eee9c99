"""What a table of accuracies allows to say, differences within the spread over seeds being called so."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One variant in one table.

    Attributes:
        name: Its name on the command line.
        title: What it is.
        parameters: Number of parameters that are trained.
        accuracies: Percent by seed.
        train_loss: Mean cross entropy of the last epoch, over the seeds; None where it was not finite.
    """

    name: str
    title: str
    parameters: int
    accuracies: dict[int, float]
    train_loss: float | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.accuracies.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    def shared(self, other: Line) -> list[int]:
        """The seeds that another variant has, too."""
        return sorted(self.accuracies.keys() & other.accuracies.keys())

    def against(self, other: Line) -> float | None:
        """Mean difference to another variant over the seeds that both have; None without one."""
        seeds = self.shared(other)
        return statistics.mean(self.accuracies[s] - other.accuracies[s] for s in seeds) if seeds else None


def noise(lines: list[Line]) -> float | None:
    """The standard deviation over seeds, pooled over the variants; None where no variant has two seeds."""
    repeated = [line for line in lines if line.spread is not None]
    if not repeated:
        return None
    weights = [len(line.accuracies) - 1 for line in repeated]
    return math.sqrt(sum(w * line.spread**2 for w, line in zip(weights, repeated)) / sum(weights))


def threshold(pooled: float, seeds: int) -> float:
    """Twice the standard error of a difference between two means of so many seeds."""
    return 2 * pooled * math.sqrt(2 / seeds)


def reading(original: str, lines: list[Line]) -> str:
    """What a table allows to say, differences within the noise being called so."""
    pooled = noise(lines)
    base = next((line for line in lines if line.name == original), None)
    if pooled is None:
        return 'One seed: how much a repetition would differ is not known, so no difference here means anything.'
    numbers = {len(line.shared(base or line)) for line in lines} - {0}
    limits = [f'{threshold(pooled, n):.2f} points with {n} seed{"s" * (n > 1)}' for n in sorted(numbers, reverse=True)]
    text = (
        f'Repetitions differ: the standard deviation over seeds, pooled over the {len(lines)} variants, is '
        f'{pooled:.2f} points. Two means are told apart here if they differ by more than two standard errors of a '
        f'difference: {", ".join(limits)}.'
    )
    return text if base is None else f'{text} {_comparison(base, lines, pooled)}'


def _comparison(base: Line, lines: list[Line], pooled: float) -> str:
    groups: dict[str, list[str]] = {'better': [], 'worse': [], 'not told apart from it': []}
    for line in lines:
        difference = line.against(base)
        if line is base or difference is None:
            continue
        is_noise = abs(difference) <= threshold(pooled, len(line.shared(base)))
        groups['not told apart from it' if is_noise else 'better' if difference > 0 else 'worse'].append(line.title)
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
    seeds = base.shared(longer)
    accuracies = ', '.join(f'{longer.accuracies[seed]:.2f}' for seed in seeds)
    return [
        f'With twice as many epochs *{base.title}* reaches {accuracies} (seed {", ".join(map(str, seeds))}), '
        f'{difference:+.2f} points.\n'
    ]
