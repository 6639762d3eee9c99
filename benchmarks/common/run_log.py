"""A log of what is finished: one line of JSON for each part, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Record = dict[str, Any]

Row = TypeVar('Row')


def read_log(path: Path) -> list[Record]:
    """All records of a log; a line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f'{path}: line {number} is not whole and is left out', flush=True)
    return records


def append_record(path: Path, record: Record) -> None:
    """Writes a record in one piece, so that several processes can share a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b'\n') and path.stat().st_size > 0
    line = (('\n' if cut_off else '') + json.dumps(record) + '\n').encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f'{path}: the disk is full')
        os.fsync(file)
    finally:
        os.close(file)


def continued(
    names: Iterable[str], known: Mapping[str, Row], look_at: Callable[[str], Row], log: Path | None
) -> Iterator[Row]:
    """The row of each name: those that are known, and the others as they are looked at, logged one by one."""
    for name in names:
        row = known.get(name)
        if row is None:
            row = look_at(name)
            if log:
                append_record(log, dict(vars(row)))
            gc.collect()  # what was built for it
        yield row


def is_logged(records: list[Record], key: Record) -> bool:
    """Whether one of the records has all these entries."""
    return any(all(record.get(name) == value for name, value in key.items()) for record in records)
