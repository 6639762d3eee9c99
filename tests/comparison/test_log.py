"""The log: whatever happens to it, what is read is true, and at most the last line is lost."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sem_timm.comparison import Row
from sem_timm.comparison.log import Log, RunKey, claimed, identity_of
from sem_timm.comparison.runs import folder_of, lock_of
from sem_timm.errors import OptionError
from sem_timm.finetuning import CheckpointError, WriteError

RUN = {'row': 'none', 'seed': 0, 'lr': 0.001, 'is_try': False, 'outcome': 'finished', 'accuracy': 0.5, 'loss': 1.0}


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path)
    log.begin({'lr': 0.001}, {'num_train': 3}, machine={}, seeds=[0, 1], baseline='none')
    log.append('row', row=Row().to_dict(), refused=None)
    log.append('run', **RUN)
    return log


def test_what_is_written_is_read(log: Log) -> None:
    row = Row(operation='sem', options={'operators': ('eca', 'ie')}, target=('layer1.0', 'layer2.0'))
    log.append('row', row=row.to_dict(), refused='too deep')
    record = Log(log.file.parent).read()
    assert record.rows == {'none': Row(), row.name: row} and record.refused == {row.name: 'too deep'}
    assert list(record.runs) == [RunKey('none', 0, 0.001)] and record.num_damaged == 0


def test_half_a_line_is_lost_and_nothing_else(log: Log) -> None:
    whole = log.file.read_bytes()
    for length in range(len(whole.rstrip(b'\n').rsplit(b'\n', 1)[0]) + 1, len(whole) - 1):
        log.file.write_bytes(whole[:length])
        record = log.read()
        assert record.runs == {} and list(record.rows) == ['none']
        log.append('run', **{**RUN, 'seed': 1})
        assert list(log.read().runs) == [RunKey('none', 1, 0.001)]


def test_damaged_lines_are_counted_and_passed_over(log: Log) -> None:
    with log.file.open('ab') as stream:
        stream.write(b'\x00\xff rubbish\n[1, 2]\n{"kind": "run"}\n')
        entry: dict[str, Any] = {'kind': 'run', 'of': log.identity}
        stream.write(json.dumps({**entry, **RUN, 'accuracy': 'high', 'seed': 3}).encode() + b'\n')
        stream.write(json.dumps({**entry, 'row': 'none'}).encode() + b'\n')
    log.append('run', **{**RUN, 'seed': 1})
    record = log.read()
    assert [key.seed for key in record.runs] == [0, 1] and record.num_damaged == 5


def test_the_first_of_two_lines_for_a_run_counts(log: Log) -> None:
    log.append('run', **{**RUN, 'accuracy': 0.9})
    assert log.read().runs[RunKey('none', 0, 0.001)]['accuracy'] == 0.5


@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('', 'has no line that says what is compared'),
        ('rubbish\n', 'has no line that says what is compared'),
        ('{"kind": "comparison", "of": "x", "format": 99}\n', 'is of another version: format 99, not 1'),
    ],
)
def test_what_is_no_log_is_refused(text: str, part: str, tmp_path: Path) -> None:
    Log(tmp_path).file.write_text(text)
    with pytest.raises(CheckpointError, match=part):
        Log(tmp_path).read()


def test_there_may_be_no_log_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'has no log of a comparison \(log.jsonl\)'):
        Log(tmp_path / 'nowhere').read()


def test_a_log_is_begun_once(log: Log) -> None:
    with pytest.raises(OptionError, match='has a log already; go on with it: --resume'):
        log.begin({}, {})


def test_lines_of_another_comparison_are_refused(log: Log) -> None:
    other = Log(log.file.parent)
    other.identity = identity_of({'lr': 0.1}, {'num_train': 3})
    other.append('run', **RUN)
    with pytest.raises(CheckpointError, match='lines of another comparison'):
        log.read()


def test_logs_of_two_machines_can_be_joined(log: Log, tmp_path: Path) -> None:
    second = Log(tmp_path / 'second')
    second.begin({'lr': 0.001}, {'num_train': 3}, machine={'data': '/elsewhere'}, seeds=[2], baseline='none')
    second.append('row', row=Row().to_dict(), refused=None)
    second.append('run', **{**RUN, 'seed': 2})
    log.file.write_bytes(log.file.read_bytes() + second.file.read_bytes())
    assert [key.seed for key in log.read().runs] == [0, 2]


def test_two_rows_of_one_name_are_refused(log: Log) -> None:
    log.append('row', row=Row(name='none', operation='sem').to_dict(), refused=None)
    with pytest.raises(CheckpointError, match="two rows 'none' that are not the same"):
        log.read()


def test_a_write_that_fails_leaves_the_log_as_it_was(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = log.file.read_bytes(), os.write
    monkeypatch.setattr(os, 'write', lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(WriteError, match='the disk is full'):
        log.append('run', **{**RUN, 'seed': 1})
    assert log.file.read_bytes() == before


def test_a_run_is_claimed_by_one(tmp_path: Path) -> None:
    file = tmp_path / 'runs' / 'a.lock'
    with claimed(file) as first, claimed(file) as second:
        assert first and not second
    with claimed(file) as third:
        assert third


def test_a_run_is_claimed_although_another_comparison_removes_the_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, original, removed = tmp_path / 'runs' / 'a.lock', Path.open, []

    def open_later(path: Path, *args: Any, **options: Any) -> Any:
        if path == file and not removed:
            removed.append(path)
            path.parent.rmdir()
        return original(path, *args, **options)

    monkeypatch.setattr(Path, 'open', open_later)
    with claimed(file) as mine:
        assert mine and removed and file.exists()


def test_a_run_whose_claim_was_removed_meanwhile_is_claimed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, lock, asked = tmp_path / 'a.lock', fcntl.flock, 0

    def flock(stream: Any, how: int) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            file.unlink()  # by the process that had it, between opening and locking
        lock(stream, how)

    monkeypatch.setattr(fcntl, 'flock', flock)
    with claimed(file) as mine:
        assert mine and file.exists() and asked == 2
        with claimed(file) as other:
            assert not other


def test_a_log_begins_with_all_of_its_rows_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = Log(tmp_path / 'new'), os.write
    rows = [('row', {'row': Row(operation=name).to_dict(), 'refused': None}) for name in ('none', 'se')]
    with monkeypatch.context() as patch:
        patch.setattr(os, 'write', lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(WriteError, match='the disk is full'):
            log.begin({}, {}, rows)
    assert not log.file.exists()
    written = []
    monkeypatch.setattr(os, 'write', lambda file, data: written.append(data) or write(file, data))
    log.begin({}, {}, rows)
    assert len(written) == 1 and [*log.read().rows] == ['none', 'se']


def test_unlike_runs_have_unlike_claims(tmp_path: Path) -> None:
    keys = [
        RunKey(row, seed, lr, is_try)
        for row in ('se', 'se @ layer4.1', 'se @ layer4.2')
        for seed in (0, 3)
        for lr in (0.001, 0.003, 5e-05, 3e-05, 1.0)
        for is_try in (False, True)
    ]
    assert len({lock_of(tmp_path, key) for key in keys} | {folder_of(tmp_path, key) for key in keys}) == 2 * len(keys)
