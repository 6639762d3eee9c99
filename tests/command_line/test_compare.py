"""``sem-timm compare``, as it is typed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sem_timm import OptionError
from sem_timm.command_line import main
from sem_timm.command_line.commands.compare import parse_seeds
from sem_timm.comparison.log import Log
from tests.finetuning.processes import finish, start
from tests.finetuning.small_runs import write_images
from tests.thorough import thorough


def arguments(data: Path, folder: Path, *given: str) -> list[str]:
    small = ['compare', 'test_resnet', '--no-pretrained', '--image-size=16', '--batch-size=8', '--epochs=1', '--cpu']
    return [*small, '--no-costs', '--data', str(data), '--output', str(folder), *given]


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


def test_a_comparison_prints_its_table_and_goes_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'run'
    assert main(arguments(images, folder, '--operations', 'none,sem', '--train', 'new,all', '--seeds', '0-1')) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f'test_resnet on {images}: 48 images for training, 15 for validation, 3 classes; 1 ')
    assert 'sem (new) ' in printed.out and f'Tables and log: {folder}' in printed.out
    assert '95 % interval' in printed.out and printed.err.count('accuracy') == 8 and ' left' in printed.err
    assert main(['compare', '--resume', str(folder), '--operations', 'eca:operators=3']) == 2
    assert "option 'operators' of operation 'eca' is unknown" in capsys.readouterr().err
    assert main(['compare', '--resume', str(folder), '--operations', 'eca', '--seeds', '2', '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in result['rows']] == ['none (head)', 'none', 'sem (new)', 'sem', 'eca']
    assert len(result['rows'][4]['accuracies']) == 2 and result['pending'] == 0


def test_seeds_are_numbers_or_ranges() -> None:
    assert parse_seeds('5') == 5 and parse_seeds('0-2') == (0, 1, 2) and parse_seeds('3,7,9-10') == (3, 7, 9, 10)
    assert parse_seeds('4-4') == (4,)
    for text in ('', 'a', '2-1', '1,,2', '-1'):
        with pytest.raises(OptionError, match='is neither a number'):
            parse_seeds(text)


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        (['--seeds', '0'], 'seeds=0 is out of range'),
        (['--seeds', 'many'], '--seeds many is neither a number, such as 5, nor seeds'),
        (['--operations', 'none,semm'], "operation 'semm' is unknown. Close: sem"),
        (['--lr-factors', 'a,b'], '--lr-factors a,b are no numbers'),
        (['--data', '/nowhere'], "data '/nowhere' is no file or folder here"),
        (['--operation', 'sem'], 'No such option: --operation'),
        (['--resume', '/nowhere'], '/nowhere has no log of a comparison'),
        (['--epochs', '0'], 'epochs=0 is out of range'),
    ],
)
def test_errors_are_one_line(given: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['compare', *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == '' and part in printed.err and printed.err.count('\n') == 1


def wait_for_runs(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not (folder / 'log.jsonl').exists() or (folder / 'log.jsonl').read_text().count('"kind": "run"') < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@thorough
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_process_that_is_ended_loses_the_run_in_progress_and_no_more(
    number: signal.Signals, images: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / 'run', tmp_path / 'whole'
    given = ('--operations', 'none,eca', '--seeds', '2', '--epochs=3')
    command = [sys.executable, '-m', 'sem_timm']
    process = start([*command, *arguments(images, folder, *given)])
    wait_for_runs(folder, 2)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=120)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130 and f'sem-timm compare --resume {folder}' in printed
    before = Log(folder).read().runs
    assert 2 <= len(before) < 4
    again = finish([*command, 'compare', '--resume', str(folder)])
    assert again.returncode == 0, again.stderr
    assert finish([*command, *arguments(images, whole, *given)]).returncode == 0
    found, expected = Log(folder).read().runs, Log(whole).read().runs
    assert {key: run['loss'] for key, run in found.items()} == {key: run['loss'] for key, run in expected.items()}


@pytest.mark.slow
def test_two_processes_compare_as_one(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    launcher = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        '-m',
        'sem_timm',
    ]
    done = finish([*launcher, *arguments(images, folder, '--operations', 'none,sem,external', '--seeds', '2')])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('95 % interval') == 1 + 1 and len(Log(folder).read().runs) == 4
    assert 'refused' in done.stdout
