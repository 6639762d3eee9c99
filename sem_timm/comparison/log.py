"""The log of a comparison: one line of JSON for each thing that is done, appended as a whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sem_timm.comparison.rows import Row
from sem_timm.errors import OptionError
from sem_timm.finetuning.errors import CheckpointError
from sem_timm.finetuning.files import explained

FORMAT = 1
NAME = 'log.jsonl'

FINISHED, DIVERGED = 'finished', 'diverged'

Entry: TypeAlias = tuple[str, dict[str, Any]]  # the kind of a line, and what it says


@dataclass(frozen=True)
class RunKey:
    """Which run of a comparison it is.

    Attributes:
        row: Name of the row.
        seed: Its seed.
        lr: Its learning rate.
        is_try: Whether it is one of the search, measured on images held out of the training images.
    """

    row: str
    seed: int
    lr: float
    is_try: bool = False


@dataclass
class Record:
    """What a log says.

    Attributes:
        begun: The first line: recipe, data, seeds and the options of the machine that began.
        rows: All rows, in the order in which they were added.
        refused: Why rows are not run, by their names.
        costs: What rows cost, by their names, as measured against the baseline that the entry names.
        runs: What came of runs, the first of each.
        num_damaged: Lines that could not be read, such as of a process that was killed while it wrote.
    """

    begun: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[RunKey, dict[str, Any]] = field(default_factory=dict)
    num_damaged: int = 0


def way_on(folder: Path) -> str:
    """How to go on with the comparison in a folder, as it is typed."""
    return f'--resume {shlex.quote(str(folder))}'


def identity_of(recipe: dict[str, Any], data: dict[str, Any]) -> str:
    """A short text that is the same for the same recipe and data, which every line of a log bears."""
    text = json.dumps([FORMAT, recipe, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Log:
    """The log in the folder of a comparison. Any number of processes may append to it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.identity = ''

    def begin(self, recipe: dict[str, Any], data: dict[str, Any], entries: Sequence[Entry] = (), **told: Any) -> None:
        """Writes the first line of a new log, and other entries with it, all of them or nothing.

        Raises:
            OptionError: If there is a log already.
            WriteError: If it cannot be written.
        """
        if self.file.exists():
            raise OptionError(f'{self.file.parent} has a log already; go on with it: {way_on(self.file.parent)}')
        with explained(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.identity = identity_of(recipe, data)
        first = {'format': FORMAT, 'recipe': recipe, 'data': data, **told}
        self.append_all([('comparison', first), *entries])

    def append(self, kind: str, **values: Any) -> None:
        """Appends one entry, as `append_all` does."""
        self.append_all([(kind, values)])

    def append_all(self, entries: Sequence[Entry]) -> None:
        """Appends entries, each a line, in one write and down to the disk.

        Raises:
            WriteError: If they cannot be written; the log is then as it was.
        """
        told = [{'kind': kind, 'of': self.identity, **values} for kind, values in entries]
        line = b''.join(json.dumps(entry, allow_nan=False).encode() + b'\n' for entry in told)
        with explained(self.file), self.file.open('ab+') as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b'\n':  # a process was killed here; its half of a line ends now
                    line = b'\n' + line
            try:
                if os.write(stream.fileno(), line) != len(line):
                    raise OSError('the disk is full')
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), size)
                if not size:
                    self.file.unlink(missing_ok=True)
                raise

    def read(self) -> Record:
        """What the log says.

        Raises:
            CheckpointError: If there is none, it has no first line, is of another version, or has lines of another
                comparison.
        """
        try:
            lines = self.file.read_bytes().split(b'\n')
        except OSError as error:
            raise CheckpointError(
                f'{self.file.parent} has no log of a comparison ({NAME}). Make one: sem-timm compare --output FOLDER'
            ) from error
        entries = [_entry(line) for line in lines if line.strip()]
        known = [entry for entry in entries if entry is not None]
        begun = next((entry for entry in known if entry['kind'] == 'comparison'), None)
        if begun is None:
            raise CheckpointError(
                f'{self.file} has no line that says what is compared; it is damaged, or no log of a comparison. Begin '
                'anew, with another --output.'
            )
        if begun.get('format') != FORMAT:
            raise CheckpointError(f'{self.file} is of another version: format {begun.get("format")}, not {FORMAT}.')
        self.identity = begun['of']
        record = Record(begun, num_damaged=len(entries) - len(known))
        for entry in known:
            self._take(record, entry)
        return record

    def _take(self, record: Record, entry: dict[str, Any]) -> None:
        if entry['of'] != self.identity:
            raise CheckpointError(
                f'{self.file} has lines of another comparison, with other data or another recipe: {entry["of"]} beside '
                f'{self.identity}. Take them out, such as by grep -v {entry["of"]}.'
            )
        try:
            if entry['kind'] == 'row':
                row = Row(**entry['row'])
                self._check_same(record.rows.setdefault(row.name, row), row)
                if entry.get('refused'):
                    record.refused[row.name] = str(entry['refused'])
            elif entry['kind'] == 'costs':
                record.costs[entry['row']] = entry['costs']
            elif entry['kind'] == 'run':
                key = RunKey(entry['row'], int(entry['seed']), float(entry['lr']), bool(entry['is_try']))
                if entry['outcome'] == FINISHED:
                    float(entry['accuracy'])
                record.runs.setdefault(key, entry)
        except OptionError:  # such as of an operator that is registered where the log was begun, and not here
            raise
        except (KeyError, TypeError, ValueError):
            record.num_damaged += 1

    def _check_same(self, known: Row, row: Row) -> None:
        if known != row:
            raise CheckpointError(
                f'{self.file} has two rows {row.name!r} that are not the same; give the one that is added another '
                'name, with :name=again behind it.'
            )


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line as data; None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    good = isinstance(entry, dict) and isinstance(entry.get('kind'), str) and isinstance(entry.get('of'), str)
    return entry if good else None


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Claims a run for this process; says whether no other one has it. A process that ends in any way lets go of it."""
    with ExitStack() as stack:
        has_it = False
        while not has_it:
            with explained(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    stream = stack.enter_context(file.open('ab'))
                except FileNotFoundError:  # another comparison that ends has removed the empty folder since
                    continue
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    break
            # The one that had it may have removed the file since it was opened; then the lock is of no file.
            with suppress(FileNotFoundError):
                has_it = os.path.samestat(os.fstat(stream.fileno()), file.stat())
        yield has_it
