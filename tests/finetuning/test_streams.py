"""Data that comes as a stream, from shards of webdataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from sem_timm.finetuning import finetune, open_run
from tests.finetuning.processes import arguments, finish, resume
from tests.finetuning.small_runs import CLASSES, NUM_TRAIN, NUM_VALIDATION, column, run_small, stop_small
from tests.thorough import thorough


@pytest.fixture(scope='module')
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shards for each split and an ``_info.json``, as timm reads them."""
    folder = tmp_path_factory.mktemp('shards')
    splits = {}
    for split in ('train', 'validation'):
        files = sorted((images / split).rglob('*.png'), key=lambda file: (file.stem, file.parent.name))
        names = [f'{split}-{number}.tar' for number in range(2)]
        for number, name in enumerate(names):
            with tarfile.open(folder / name, 'w') as shard:
                for file in files[number::2]:
                    key = f'{file.parent.name}-{file.stem}'
                    _add(shard, f'{key}.png', file.read_bytes())
                    _add(shard, f'{key}.cls', str(CLASSES.index(file.parent.name)).encode())
        lengths = [len(files[number::2]) for number in range(2)]
        splits[split] = {'name': split, 'num_samples': len(files), 'filenames': names, 'shard_lengths': lengths}
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))
    return folder


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def test_shards_are_learned_and_gone_on_with(shards: Path, tmp_path: Path) -> None:
    stop_small(f'wds/{shards}', tmp_path / 'run', 8, num_classes=3, workers=2)
    result = finetune(resume=str(tmp_path / 'run'), progress=False)
    assert result.num_images == (NUM_TRAIN * 3, NUM_VALIDATION * 3) and result.num_steps == 12
    assert column(tmp_path / 'run', 'step') == [str(step) for step in range(1, 13)]
    run = open_run(tmp_path / 'run')
    assert [len([*run.training]) for _ in range(2)] == [len(run.training)] * 2 == [6, 6]  # although a stream has no end
    assert sum(len(labels) for _, labels in run.validation) == NUM_VALIDATION * 3


def test_shards_are_grey_for_a_model_of_grey_images(shards: Path, tmp_path: Path) -> None:
    given = {'num_classes': 3, 'model_options': {'in_chans': 1}, 'epochs': 1}
    assert run_small(f'wds/{shards}', tmp_path / 'run', **given).num_steps == 6


@thorough
def test_shards_are_learned_in_processes_of_their_own(shards: Path, tmp_path: Path) -> None:
    given = ('--num-classes', '3', '--epochs', '2', '--workers', '2', '--no-progress')
    stopped = finish(arguments(f'wds/{shards}', tmp_path / 'run', *given, '--stop-at', '8'))
    assert stopped.returncode == 143, stopped.stderr
    done = finish(resume(tmp_path / 'run', '--json'))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['num_images'] == [NUM_TRAIN * 3, NUM_VALIDATION * 3] and result['num_steps'] == 12
    assert column(tmp_path / 'run', 'step') == [str(step) for step in range(1, 13)]


@thorough
@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ((), 'does not tell its number of classes; give --num-classes'),
        (('--num-classes', '2'), 'has the label 2, and the labels of 2 classes are 0 to 1; give --num-classes 3'),
        (('--num-classes', '3', '--train-split', 'test'), 'split test not found in info'),
        (('--num-classes', '3', '--train-split', 'train-{1..3}.tar|48'), '2 of 3 shards are not in'),
    ],
)
def test_what_is_wrong_with_shards_is_told(given: tuple[str, ...], part: str, shards: Path, tmp_path: Path) -> None:
    done = finish(arguments(f'wds/{shards}', tmp_path / 'run', '--no-progress', *given))
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith('sem-timm: ') and part in message and 'Traceback' not in done.stderr
