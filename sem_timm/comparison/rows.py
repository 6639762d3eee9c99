"""What is compared: an operation, where it is put, its options, and what is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from sem_timm.errors import OptionError
from sem_timm.finetuning.options import ALL, HEAD, NEW, NO_OPERATION, FinetuneOptions, as_tuples
from sem_timm.operations import AttentionConfig, resolve_operation
from sem_timm.typed_values import parse_pairs

# What a row says beside the options of its operation.
_OWN = ('name', 'target', 'exclude', 'train')


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a comparison; all rows have the same recipe, images and base weights.

    Attributes:
        name: Name in tables; by default made from the rest.
        operation: Short name of an operation, or 'none'.
        target: Where it is put, see `plan_model`.
        exclude: Where not.
        options: Options of the operation; numbers, texts and lists of them, as a log holds them.
        train: What is trained, as in `FinetuneOptions`; None for what the comparison says, by default all.

    Raises:
        OptionError: If the operation, an option or what is to be trained is unknown, or no log could hold it.
    """

    name: str = ''
    operation: str = NO_OPERATION
    target: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operation, str):
            raise OptionError(
                f'operation={self.operation!r} has no name that a log could hold. An excitation operator of your own '
                "gets one by sem_timm.register_excitation('name', Class)."
            )
        for name in ('target', 'exclude', 'options'):
            object.__setattr__(self, name, as_tuples(getattr(self, name)))
        object.__setattr__(self, 'name', self.name or self._made_name())
        try:
            json.dumps(self.to_dict())
        except TypeError as error:
            raise OptionError(f'row {self.name!r} has what a log cannot hold: {error}.') from error
        try:
            self.applied_to(FinetuneOptions())
            if self.operation != NO_OPERATION:
                resolve_operation(self.operation, **self.options)
        except OptionError as error:
            raise OptionError(f'row {self.name!r}: {error}') from error

    def _made_name(self) -> str:
        parts = [f'{key}={_typed(value)}' for key, value in self.options.items()]
        where = '' if self.target is None else f' @ {_typed(self.target)}'
        kept = '' if self.exclude is None else f' but {_typed(self.exclude)}'
        trained = '' if self.train in (None, ALL) else f' ({self.train})'
        return ' '.join([self.operation, *parts]) + where + kept + trained

    def applied_to(self, options: FinetuneOptions) -> FinetuneOptions:
        """The options of a run with what this row says."""
        return replace(
            options,
            operation=self.operation,
            target=self.target,
            exclude=self.exclude,
            operation_options=self.options,
            train=self.train or ALL,
        )

    def to_dict(self) -> dict[str, Any]:
        """The row as data that `json.dumps` takes."""
        return asdict(self)


def _typed(value: Any) -> str:
    """A value as it would be typed."""
    return ','.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def parse_rows(text: str) -> list[Row]:
    """Reads rows such as ``none,se,eca`` or ``none sem:operators=eca,ie:position=output se``.

    Rows are separated by commas or spaces. Behind a colon stands an option of the operation, or ``target=``,
    ``exclude=``, ``train=`` or ``name=``; as its value may have commas, such a row ends at a space or the end.

    Raises:
        OptionError: If that cannot be read, or names something unknown.
    """
    found = []
    for words in text.split():
        plain, colon, rest = words.partition(':')
        names = [name for name in plain.split(',') if name]
        if not names:
            raise OptionError(f'{words!r} names no operation; such as none,se or sem:operators=eca,ie.')
        found += [Row(operation=name) for name in (names[:-1] if colon else names)]
        if colon:
            found.append(_with_options(names[-1], _parted(rest, ':'), words))
    return found


def _parted(text: str, mark: str) -> list[str]:
    """Parts of a text between marks that are not in brackets, as those of a regular expression may be."""
    parts, depth = [''], 0
    for character in text:
        depth += (character in '([{') - (character in ')]}')
        if character == mark and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return parts if depth == 0 else text.split(mark)


def _with_options(name: str, pairs: Sequence[str], text: str) -> Row:
    own: dict[str, Any] = {}
    for key, equals, value in (pair.partition('=') for pair in pairs):
        if not equals or key not in _OWN:
            continue
        if key in own:
            raise OptionError(f'{name}: {key}=... is given twice.')
        several = _parted(value, ',') if key in ('target', 'exclude') else []
        own[key] = tuple(several) if len(several) > 1 else value
    options = parse_pairs([pair for pair in pairs if pair.partition('=')[0] not in own], f'{name}:')
    try:
        return Row(operation=name, options=options, **own)
    except OptionError as error:
        way = ' A row with options ends at a space, not at a comma.' if ',' in text else ''
        raise OptionError(f'{error}{way}') from error


def make_rows(
    operations: Sequence[str | Row], targets: Sequence[str], positions: Sequence[str], train: Sequence[str]
) -> list[Row]:
    """All rows of a comparison: each operation at each target, at each position, each way of training.

    The base alone has neither target nor position, and nothing new to be trained; what is put in is always trained. So
    ``('head', 'norms')`` means ``'new'`` and ``'new+norms'`` where an operation puts something in, and the other way
    round.

    Args:
        operations: Texts of `parse_rows`, or rows, to which nothing is added.
        targets: Regular expressions over module names; empty for all that an operation takes.
        positions: Positions, see `plan_model`; empty for that of the operation.
        train: What is trained.

    Raises:
        OptionError: If two rows have the same name, or there is none.
    """
    rows: list[Row] = []
    for entry in operations:
        if isinstance(entry, Row):
            rows.append(replace(entry, train=entry.train or ALL))
            continue
        for row in parse_rows(entry):
            rows += _spread(row, targets, positions, train)
    if not rows:
        raise OptionError('there is nothing to compare; such as --operations none,se,sem.')
    for name, given, used in (
        ('target', targets, any(row.target in targets for row in rows)),
        ('position', positions, any(row.options.get('position') in positions for row in rows)),
    ):
        if given and not used and not any(isinstance(entry, Row) for entry in operations):  # to which nothing is added
            raise OptionError(f'{name}={", ".join(given)}: no row here takes it; leave it out.')
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f'row {twice!r} is there twice; give one of them another name, with :name=again behind it.')
    return rows


def _spread(row: Row, targets: Sequence[str], positions: Sequence[str], train: Sequence[str]) -> list[Row]:
    is_base = row.operation == NO_OPERATION
    ways = [row.train] if row.train is not None else list(dict.fromkeys(_trained(way, is_base) for way in train))
    if is_base:
        return [_renamed(row, train=way) for way in ways]
    places = [row.target] if row.target is not None or not targets else list(targets)
    is_inserted = not isinstance(resolve_operation(row.operation, **row.options), AttentionConfig)
    is_free = is_inserted and 'position' not in row.options
    where: Sequence[str | None] = positions if positions and is_free else [None]
    made = []
    for place, position, way in product(places, where, ways):
        options = row.options if position is None else {'position': position, **row.options}
        made.append(_renamed(row, target=place, options=options, train=way))
    return made


def _trained(train: str, is_base: bool) -> str:
    """What is trained of the base alone, or of it with something put in."""
    parts = [part for part in train.split('+') if part not in (NEW, HEAD)]
    if ALL in parts:
        return train
    return '+'.join(parts) or HEAD if is_base else '+'.join([NEW, *parts])


def _renamed(row: Row, **changes: Any) -> Row:
    """A row with changes, and with the name that goes with them unless it has one of its own."""
    return replace(row, **changes, name='' if row.name == row._made_name() else row.name)
