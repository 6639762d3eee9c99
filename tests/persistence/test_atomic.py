"""Saving over a patch: whatever goes wrong, the folder holds the old patch or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sem_timm
from tests.persistence.patches import base, outputs, patch, weights_file


def loaded(folder: Path) -> torch.Tensor:
    return outputs(sem_timm.load_patch(base(), folder, check_base='error'))


@pytest.fixture(scope='module')
def two() -> list[Any]:
    return [patch(base()), patch(base(), ('sem', {'reduction': 4}))]


def test_a_new_patch_takes_the_place_of_the_old(tmp_path: Path, two: list[Any]) -> None:
    (tmp_path / 'README.md').write_text('mine')
    for model in (*two, two[0], two[0]):
        sem_timm.save_patch(model, tmp_path)
        assert torch.equal(loaded(tmp_path), outputs(model))
        assert sorted(f.name for f in tmp_path.iterdir()) == ['README.md', weights_file(tmp_path).name, 'patch.json']
    if os.name == 'posix':
        assert (tmp_path / 'patch.json').stat().st_mode == (tmp_path / 'README.md').stat().st_mode


@pytest.mark.parametrize('name', ['fsync', 'replace'])
@pytest.mark.parametrize('count', [0, 1])
@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()], ids=repr)
def test_failure_leaves_the_old_patch(
    tmp_path: Path, two: list[Any], name: str, count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    sem_timm.save_patch(two[0], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls: list[Any] = []
    original = getattr(os, name)

    def fail(first: Any, *rest: Any) -> Any:
        if name == 'replace' or not os.path.isdir(f'/proc/self/fd/{first}'):  # not that of the folder
            calls.append(first)
            if len(calls) == count + 1:
                raise error
        return original(first, *rest)

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(type(error)):
        sem_timm.save_patch(two[1], tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert torch.equal(loaded(tmp_path), outputs(two[0]))
    sem_timm.save_patch(two[1], tmp_path)
    assert torch.equal(loaded(tmp_path), outputs(two[1]))


def test_interrupt_after_the_last_step_leaves_the_new_patch(
    tmp_path: Path, two: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sem_timm.save_patch(two[0], tmp_path)
    replace = os.replace

    def late(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == 'patch.json':
            raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', late)
    with pytest.raises(KeyboardInterrupt):
        sem_timm.save_patch(two[1], tmp_path)
    assert torch.equal(loaded(tmp_path), outputs(two[1]))


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path, two: list[Any]) -> None:
    old, young = tmp_path / '.patch-0123', tmp_path / '.patch-4567'
    for file in (old, young, tmp_path / f'patch-{"0" * 32}.safetensors', tmp_path / 'patch-mine.safetensors'):
        file.touch()
    os.utime(old, (0, 0))
    sem_timm.save_patch(two[0], tmp_path)
    left = sorted(file.name for file in tmp_path.glob('*patch-*'))
    assert not old.exists() and young.exists()
    assert left == [young.name, *sorted([weights_file_of(tmp_path), 'patch-mine.safetensors'])]


def weights_file_of(folder: Path) -> str:
    (name,) = [f.name for f in folder.glob('patch-*.safetensors') if 'mine' not in f.name]
    return name


def test_a_folder_that_cannot_be(tmp_path: Path, two: list[Any]) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(sem_timm.PatchFileError, match='is a file'):
        sem_timm.save_patch(two[0], tmp_path / 'file')
    assert sem_timm.save_patch(two[0], str(tmp_path / 'a' / 'b')) == tmp_path / 'a' / 'b'


# Writes two patches in turn in child processes, kills each at another moment, and loads what is there.
KILLING = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
import sem_timm
from sem_timm.persistence import save
from tests.persistence.patches import base, outputs, patch

folder, saves, write = Path(sys.argv[1]), [], save.write
save.write = lambda *args: saves.append(args)
models = [patch(base()), patch(base(), ('sem', {'reduction': 4}))]
for model in models:
    sem_timm.save_patch(model, folder)
write(*saves[0])
expected = [outputs(model) for model in models]
random.seed(0)
seen = set()
for _ in range(10):
    child = os.fork()
    if child == 0:
        for args in itertools.cycle(saves):
            write(*args)
    time.sleep(random.uniform(0.01, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    out = outputs(sem_timm.load_patch(base(), folder, check_base='error'))
    seen.add([torch.equal(out, one) for one in expected].index(True))
print(sorted(seen))
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_patch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, '-c', KILLING, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.stdout.strip() == '[0, 1]', result.stderr
