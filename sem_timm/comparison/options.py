"""What a comparison is told beside the recipe that all of its runs share."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from inspect import cleandoc
from typing import Any

from sem_timm.comparison.rows import Row
from sem_timm.errors import OptionError
from sem_timm.finetuning.options import ALL, FinetuneOptions, option, plain_value

LEARNING_RATE = 'lr'

# Options of a run that a row or the comparison says.
OF_ROWS = ('operation', 'target', 'exclude', 'operation_options', 'train', 'freeze_base')
OF_RUNS = ('seed', 'output', 'resume', 'checkpoint_every', 'keep', 'stop_at', 'trackers', 'progress')

# Options that may differ from one machine to another: with them the figures are the same, but for rounding.
OF_MACHINES = (
    'data',
    'data_root',
    'download',
    'workers',
    'skip_bad_images',
    'weights',
    'cpu',
    'compile',
    'channels_last',
)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What a comparison is told; each field is also an option of ``sem-timm compare``.

    Raises:
        OptionError: If a value is out of range.

    Attributes:
    """

    operations: tuple[str | Row, ...] = option(
        ('none,se,eca,ie,sem',),
        'Rows',
        'What is compared, such as none,se or "none sem:operators=eca,ie:position=output se"; repeatable. Behind a '
        'colon also target=, exclude=, train= or name=.',
    )
    target: tuple[str, ...] = option(
        (), 'Rows', 'A regular expression over module names; repeated, each operation is tried at each.'
    )
    position: tuple[str, ...] = option(
        (), 'Rows', 'residual or output; repeated, each inserted operation is tried at each.'
    )
    train: tuple[str, ...] = option(
        (ALL,),
        'Rows',
        'What is trained beside the head, such as all, or head,norms,new,new+norms; each makes rows. Without an '
        'operation nothing is new, and what is put in is always trained.',
    )
    baseline: str | None = option(
        None, 'Rows', "Name of the row that the others are compared with; by default the first 'none', else the first."
    )

    seeds: int | tuple[int, ...] = option(
        5, 'Runs', 'How many seeds; or which, such as 0-2 on one machine and 3-4 on another, with the same log.'
    )
    search: str | None = option(
        None, 'Runs', "'lr': each row has the learning rate of as many tries that is best on held-out training images."
    )
    lr_factors: tuple[float, ...] = option((0.3, 1.0, 3.0), 'Runs', 'What --lr is multiplied by in the tries.')
    search_seeds: int = option(1, 'Runs', 'Seeds of each try.')
    costs: bool = option(True, 'Runs', 'Measure time and memory of a training step too.')
    keep_runs: bool = option(False, 'Runs', 'Keep weights and logs of each run, in runs/ of the folder.')
    output: str | None = option(
        None, 'Runs', 'New folder for log and tables; by default in comparisons/, named by date and time.'
    )
    resume: str | None = option(
        None, 'Runs', 'Folder of a comparison to go on with; other operations and seeds are added to it.'
    )
    progress: bool = option(True, 'Runs', 'Show progress.')

    def __post_init__(self) -> None:
        for name in ('operations', 'target', 'position', 'train'):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, Row)) else tuple(value))
        for entry in self.operations:
            if not isinstance(entry, (str, Row)):
                Row(operation=entry)  # tells why that is no operation of a row
        object.__setattr__(self, 'seeds', _seeds(self.seeds))
        object.__setattr__(self, 'lr_factors', _factors(self.lr_factors))
        for name in ('output', 'resume'):
            object.__setattr__(self, name, plain_value(name, getattr(self, name), 'str | None'))
        if not self.train:
            raise OptionError("train=() leaves no row; such as 'all', or 'head,new'.")
        if self.search not in (None, LEARNING_RATE):
            raise OptionError(f'search={self.search!r} is unknown. There is: {LEARNING_RATE!r}.')
        if self.search_seeds < 1:
            raise OptionError(f'search_seeds={self.search_seeds} is out of range: it must be at least 1.')
        wrong = [factor for factor in self.lr_factors if not 0 < factor < math.inf]
        if wrong or not self.lr_factors:
            raise OptionError(f'lr_factors={self.lr_factors} are no factors above 0, such as 0.3,1,3.')
        if not self.seed_numbers:
            raise OptionError(f'seeds={self.seeds!r} is out of range: at least one seed, such as 5.')
        if min(self.seed_numbers) < 0 or len({*self.seed_numbers}) < len(self.seed_numbers):
            raise OptionError(f'seeds={self.seeds!r} are no numbers from 0 on, each once.')

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, by number."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)


def _seeds(given: Any) -> int | tuple[int, ...]:
    """How many seeds, or which, as Python's own numbers."""
    try:
        return tuple(map(operator.index, given)) if isinstance(given, Iterable) else operator.index(given)
    except TypeError as error:
        raise OptionError(f'seeds={given!r} are no whole numbers; such as 5, or (0, 1, 2).') from error


def _factors(given: Any) -> tuple[float, ...]:
    try:
        if isinstance(given, str):  # whose characters may be numbers
            raise TypeError
        return tuple(map(float, given)) if isinstance(given, Iterable) else (float(given),)
    except (TypeError, ValueError) as error:
        raise OptionError(f'lr_factors={given!r} are no numbers, such as (0.3, 1, 3).') from error


RECIPE = tuple(f.name for f in fields(FinetuneOptions) if f.name not in (*OF_ROWS, *OF_RUNS, *OF_MACHINES))

CompareOptions.__doc__ = '\n    '.join(
    [cleandoc(f'{CompareOptions.__doc__}'), *(f'{o.name}: {o.metadata["help"]}' for o in fields(CompareOptions))]
)
