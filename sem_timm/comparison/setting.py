"""What a comparison is, from what was asked and, where one goes on, from its log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sem_timm.comparison.data import check_splits, data_identity, differences
from sem_timm.comparison.demonstration import demonstration
from sem_timm.comparison.log import Log, Record, way_on
from sem_timm.comparison.options import OF_MACHINES, OF_ROWS, RECIPE, CompareOptions
from sem_timm.comparison.rows import Row, make_rows
from sem_timm.comparison.runs import Search
from sem_timm.errors import OptionError, closest
from sem_timm.finetuning.errors import CheckpointError
from sem_timm.finetuning.options import NO_OPERATION, FinetuneOptions, as_tuples

_DEFAULT_TUNING = 0.2

_ALWAYS_FREE = {*OF_MACHINES} - {'data', 'weights'}

_MAKING_ROWS = ('operations', 'target', 'position', 'train')
_OF_SEARCH = ('search', 'lr_factors', 'search_seeds')


@dataclass(frozen=True)
class Setting:
    """A comparison, before anything is done.

    Attributes:
        options: What it was told beside the recipe.
        base: The options of all runs, but for what rows and seeds say.
        folder: Its folder.
        rows: The rows that were asked for; those of the log come before them.
        seeds: The seeds of this process.
        baseline: Name of the row that the others are compared with.
        search: The search for learning rates, or None.
        data: What tells the images from others.
        num_images: Images for training and for validation.
        record: The log that it goes on with, or None.
        costs_asked: Whether that was begun without measuring costs, perhaps, and is to have them now.
    """

    options: CompareOptions
    base: FinetuneOptions
    folder: Path
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    baseline: str
    search: Search | None
    data: dict[str, Any]
    num_images: tuple[int, int]
    record: Record | None = None
    costs_asked: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """What must be the same in all runs of a log, as JSON has it."""
        values = {name: getattr(self.base, name) for name in RECIPE}
        search = None if self.search is None else asdict(self.search)
        return dict(_as_json({**values, 'search': search}))

    @property
    def machine(self) -> dict[str, Any]:
        """What may differ from one machine to another."""
        return {name: getattr(self.base, name) for name in OF_MACHINES}


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the comparison, and of the recipe.

    Raises:
        OptionError: If one is unknown, or said by rows and seeds.
    """
    own = {option.name for option in fields(CompareOptions)}
    known = {*RECIPE, *OF_MACHINES}
    for name in given:
        if name not in own | known:
            if name in OF_ROWS:
                raise OptionError(f"option {name!r} is said by the rows: operations=('none', 'sem:reduction=8').")
            raise OptionError(f'option {name!r} is unknown. {closest(name, sorted(own | known))}')
    ours = {name: value for name, value in given.items() if name in own}
    return ours, {name: value for name, value in given.items() if name not in own}


def open_setting(given: Mapping[str, Any]) -> Setting:
    """The comparison that some options mean; nothing is written.

    Raises:
        SemTimmError: If they contradict each other or a log, or there are too few images.
    """
    ours, recipe = split_options(given)
    options = CompareOptions(**ours)
    return _new(options, ours, recipe) if options.resume is None else _going_on(options, ours, recipe)


def _new(options: CompareOptions, ours: dict[str, Any], given: dict[str, Any]) -> Setting:
    if not {*given} - _ALWAYS_FREE:
        shown, recipe = demonstration()
        kept = {name: getattr(options, name) for name in ours}  # of which some may have been read but once
        options, given = CompareOptions(**{**shown, **kept}), {**recipe, **given}
    base = _base(given)
    folder = Path(options.output or _default_folder(base))
    if folder.exists() and not folder.is_dir():
        raise OptionError(f'{folder} is a file; name a new folder for the comparison: --output FOLDER.')
    if folder.exists() and any(folder.iterdir()):
        way = f'go on with it by {way_on(folder)}, or name' if Log(folder).file.exists() else 'name'
        raise OptionError(f'{folder} exists and is not empty; {way} another --output.')
    rows = make_rows(options.operations, options.target, options.position, options.train)
    seeds = options.seed_numbers
    search = None
    if options.search is None:
        idle: list[str] = [name for name in ('lr_factors', 'search_seeds') if name in ours]
        if base.tuning_fraction:
            idle.append('tuning_fraction')
        if idle:
            raise OptionError(f"{', '.join(idle)}: without search='lr' there are no tries that this would be for.")
    else:
        if options.search_seeds > len(seeds):
            raise OptionError(f'search_seeds={options.search_seeds} are more than the {len(seeds)} seeds of the runs.')
        lrs = tuple(sorted({float(f'{base.lr * factor:.6g}') for factor in options.lr_factors}))
        search = Search(lrs, seeds[: options.search_seeds], base.tuning_fraction or _DEFAULT_TUNING)
    numbers = check_splits(base, 0.0 if search is None else search.fraction)
    baseline = _baseline(options.baseline, rows)
    return Setting(options, base, folder, tuple(rows), seeds, baseline, search, data_identity(base), numbers)


def _going_on(options: CompareOptions, ours: dict[str, Any], given: dict[str, Any]) -> Setting:
    folder = Path(options.resume or '')
    if options.output is not None:
        raise OptionError('output is that of the comparison that goes on; leave it out.')
    record = Log(folder).read()
    try:
        told = dict(record.begun['recipe'])
        search = _search(told.pop('search'))
        machine = dict(record.begun['machine'])
        begun_seeds, baseline = tuple(record.begun['seeds']), str(record.begun['baseline'])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'the first line of {Log(folder).file} is damaged: {str(error).rstrip(".")}.') from error
    unknown = sorted({*told, *machine} - {*RECIPE, *OF_MACHINES})
    if unknown:
        raise CheckpointError(
            f'{Log(folder).file} says {", ".join(unknown)}, which this version of sem_timm does not know. Go on with '
            'the version that began it.'
        )
    base = _base({**told, **machine, **given})
    fixed = sorted({*ours} & {*_OF_SEARCH})
    if fixed:
        raise OptionError(f'the search is that of the comparison that goes on; leave out {", ".join(fixed)}.')
    rows = [*record.rows.values(), *_added(options, ours, record)]
    done = tuple(sorted({key.seed for key in record.runs if not key.is_try}))
    seeds = options.seed_numbers if 'seeds' in ours else tuple(dict.fromkeys((*begun_seeds, *done)))
    numbers = check_splits(base, 0.0 if search is None else search.fraction)
    name = options.baseline or baseline
    was_there = name == baseline or any(key.row == name for key in record.runs)
    if record.num_damaged and was_there and name not in [row.name for row in rows]:
        raise CheckpointError(
            f'the line of {Log(folder).file} that says what row {name!r} is, is damaged. Add the row as it was asked '
            f'for: {way_on(folder)} --operations ..., with the --train and --target that it had.'
        )
    name = _baseline(name, rows)
    setting = Setting(
        options=options,
        base=base,
        folder=folder,
        rows=tuple(rows),
        seeds=seeds,
        baseline=name,
        search=search,
        data=data_identity(base),
        num_images=numbers,
        record=record,
        costs_asked=bool(ours.get('costs')),
    )
    _check_same(setting, record)
    return setting


def _added(options: CompareOptions, ours: dict[str, Any], record: Record) -> list[Row]:
    """The rows that are new."""
    told = [name for name in _MAKING_ROWS if name in ours]
    if told and 'operations' not in ours:
        raise OptionError(f'{", ".join(told)} without operations; name those that are to be added: --operations.')
    if not told:
        return []
    asked = make_rows(options.operations, options.target, options.position, options.train)
    for row in asked:
        if row.name in record.rows and record.rows[row.name] != row:
            raise OptionError(
                f'the comparison has another row {row.name!r} already; give this one another name, with :name=again '
                'behind it.'
            )
    return [row for row in asked if row.name not in record.rows]


def _check_same(setting: Setting, record: Record) -> None:
    """Refuses data or a recipe that are not those of the log."""
    file = Log(setting.folder).file
    # What options that a log is older than do by default is what was done without them.
    later = {f.name: f.default for f in fields(FinetuneOptions) if f.name in RECIPE}
    begun = {name: value for name, value in record.begun['recipe'].items() if name not in OF_MACHINES}
    recipe = differences({**_as_json(later), **begun}, setting.recipe)
    if recipe:
        raise OptionError(
            f'{file} was made with another recipe: {"; ".join(recipe)}. Leave that out to go on with it, or name '
            'another --output.'
        )
    data = differences(record.begun['data'], setting.data)
    if data:
        raise OptionError(
            f'{file} was made with other data than {setting.base.data}: {"; ".join(data)}. Give the same images, or '
            'name another --output.'
        )


def _base(given: Mapping[str, Any]) -> FinetuneOptions:
    """The options of all runs: what is held out is the same for all seeds, and accuracy is measured at the end."""
    base = FinetuneOptions(**as_tuples({'split_seed': 0, **given}))
    return replace(base, operation=NO_OPERATION, measure_every=given.get('measure_every') or base.epochs)


def _baseline(asked: str | None, rows: list[Row]) -> str:
    names = [row.name for row in rows]
    if asked is not None:
        if asked not in names:
            raise OptionError(f'baseline {asked!r} is no row. {closest(asked, names)}')
        return asked
    return next((row.name for row in rows if row.operation == NO_OPERATION), names[0])


def _default_folder(base: FinetuneOptions) -> str:
    label = base.model.rsplit('/', 1)[-1].replace(':', '-')
    return f'comparisons/{label}-{time.strftime("%Y%m%d-%H%M%S")}'


def _search(told: Any) -> Search | None:
    return None if told is None else Search(tuple(told['lrs']), tuple(told['seeds']), float(told['fraction']))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    return [_as_json(entry) for entry in value] if isinstance(value, (tuple, list)) else value
