"""What came out of a comparison, as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sem_timm.comparison.costs import Costs
from sem_timm.comparison.log import FINISHED, Record, RunKey
from sem_timm.comparison.rows import Row
from sem_timm.comparison.runs import Search, chosen_lr
from sem_timm.comparison.statistics import Difference, compare_pairs
from sem_timm.errors import NoMatchError, closest


@dataclass(frozen=True)
class RowResult:
    """What came out of one row.

    Attributes:
        row: What was done.
        lr: Its learning rate; None while it is searched.
        accuracies: Accuracy after the last epoch, from 0 to 1, of each seed that finished.
        losses: Mean cross entropy at that point, likewise.
        diverged: Why runs diverged, by their seeds.
        diverged_tries: How many tries of the search diverged.
        bad_images: The most images that one of its runs could not read and left out.
        refused: Why the model refuses the operation; None if it does not.
        costs: What it costs; None if the row was refused.
        difference: How it compares with the baseline; None for the baseline itself and for what was refused.
    """

    row: Row
    lr: float | None
    accuracies: Mapping[int, float]
    losses: Mapping[int, float]
    diverged: Mapping[int, str]
    diverged_tries: int = 0
    bad_images: int = 0
    refused: str | None = None
    costs: Costs | None = None
    difference: Difference | None = None

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.row.name

    @property
    def mean(self) -> float | None:
        """Mean accuracy over seeds; None without a finished run."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracy over seeds; None for less than two."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    @property
    def loss(self) -> float | None:
        """Mean loss over seeds; None without a finished run."""
        return statistics.fmean(self.losses.values()) if self.losses else None


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """What came out of a comparison; prints as a table with what can be told.

    Attributes:
        rows: The rows, in the order in which they were asked for.
        baseline: Name of the row that the others are compared with.
        folder: Where log and tables are.
        told: Model, data, numbers of images, epochs and what else a reader wants to know.
        num_images: Images for training and for validation.
        search: The search for learning rates, or None.
        num_pending: Runs that are still to be done, such as by another machine.
        num_damaged: Lines of the log that could not be read; runs among them were done again.
        versions: Those of sem_timm, timm and torch that runs were made with, as far as the log tells.
        without_row: How many runs there are of rows whose line in the log is damaged, by the name of the row.
        too_large: Runs for which the memory of this machine was too small, and what was said of it.
    """

    rows: tuple[RowResult, ...]
    baseline: str
    folder: Path
    told: Mapping[str, Any]
    num_images: tuple[int, int]
    search: Search | None = None
    num_pending: int = 0
    num_damaged: int = 0
    versions: tuple[str, ...] = ()
    without_row: Mapping[str, int] = field(default_factory=dict)
    too_large: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> RowResult:
        """A row by its name.

        Raises:
            NoMatchError: If there is none of that name.
        """
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise NoMatchError(f'there is no row {name!r}. {closest(name, [row.name for row in self.rows])}')
        return found

    def difference(self, row: str, other: str) -> Difference:
        """How much higher the accuracy of one row is than that of another, over the seeds that both have finished."""
        return _difference(self[row].accuracies, self[other].accuracies, row, other, self.num_images[1])

    @cached_property
    def conclusions(self) -> tuple[str, ...]:
        """What can be told and what cannot, as sentences."""
        from sem_timm.comparison.conclusions import conclude

        return tuple(conclude(self))

    def table(self) -> str:
        """The rows as a table of plain text; accuracies in percent, differences in points."""
        from sem_timm.comparison.tables import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return '\n'.join([self.table(), '', *self.conclusions])

    def to_dict(self) -> dict[str, Any]:
        """The result as data that `json.dumps` takes."""
        return {
            'told': dict(self.told),
            'baseline': self.baseline,
            'folder': str(self.folder),
            'images': list(self.num_images),
            'search': None if self.search is None else asdict(self.search),
            'pending': self.num_pending,
            'rows': [_row_as_dict(row) for row in self.rows],
            'conclusions': list(self.conclusions),
        }


def _row_as_dict(row: RowResult) -> dict[str, Any]:
    return {
        **row.row.to_dict(),
        'refused': row.refused,
        'lr': row.lr,
        'accuracy': row.mean,
        'spread': row.spread,
        'loss': row.loss,
        'accuracies': dict(row.accuracies),
        'losses': dict(row.losses),
        'diverged': dict(row.diverged),
        'diverged_tries': row.diverged_tries,
        'difference': None if row.difference is None else asdict(row.difference),
        'costs': None if row.costs is None else row.costs.to_dict(),
    }


def _difference(
    first: Mapping[int, float], second: Mapping[int, float], row: str, other: str, num_images: int
) -> Difference:
    both = sorted({*first} & {*second})
    return compare_pairs(row, other, [first[seed] for seed in both], [second[seed] for seed in both], num_images)


def row_results(record: Record, search: Search | None, lr: float, baseline: str, num_images: int) -> list[RowResult]:
    """The rows of a log."""
    found = {name: _row_result(record, search, lr, baseline, name) for name in record.rows}
    against = found[baseline].accuracies
    rows = []
    for name, row in found.items():
        compared = name != baseline and row.refused is None
        difference = _difference(row.accuracies, against, name, baseline, num_images) if compared else None
        rows.append(replace(row, difference=difference))
    return rows


def _row_result(record: Record, search: Search | None, lr: float, baseline: str, name: str) -> RowResult:
    refused = record.refused.get(name)
    rate = None if refused else chosen_lr(record, search, lr, name)
    runs = {key: entry for key, entry in record.runs.items() if key.row == name}
    own = {key.seed: entry for key, entry in sorted(runs.items(), key=_by_seed) if not key.is_try and key.lr == rate}
    finished = {seed: entry for seed, entry in own.items() if entry['outcome'] == FINISHED}
    costs = record.costs.get(name)
    if costs is not None and costs['baseline'] != baseline:  # as another process measured them, against another row
        costs = {**costs, 'step_ratio': None, 'peak_ratio': None}
    return RowResult(
        row=record.rows[name],
        lr=rate,
        accuracies={seed: entry['accuracy'] for seed, entry in finished.items()},
        losses={seed: entry['loss'] for seed, entry in finished.items()},
        diverged={seed: str(entry.get('reason')) for seed, entry in own.items() if seed not in finished},
        bad_images=max((entry.get('bad_images', 0) for entry in runs.values()), default=0),
        diverged_tries=sum(key.is_try and entry['outcome'] != FINISHED for key, entry in runs.items()),
        refused=refused,
        costs=None if costs is None else Costs(**costs),
    )


def _by_seed(item: tuple[RunKey, dict[str, Any]]) -> int:
    return item[0].seed
