"""Runs that are stopped from outside, in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sem_timm.finetuning import StoppedError, finetune
from sem_timm.finetuning.checkpoints import find_checkpoint, read_state
from sem_timm.finetuning.stopping import StopRequest
from tests.finetuning.processes import arguments, finish, resume, start, wait_for_rows
from tests.finetuning.small_runs import column, run_small, stop_small
from tests.thorough import first_of_each, thorough


@pytest.mark.parametrize(('number', 'code'), first_of_each([(signal.SIGINT, 130), (signal.SIGTERM, 143)]))
def test_signal_saves_and_stops_and_the_run_goes_on_exactly(
    number: signal.Signals, code: int, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / 'run'
    process = start(arguments(images, run, '--epochs', '40', '--workers', '1'))
    wait_for_rows(process, run / 'train.csv', 7)
    os.killpg(process.pid, number)  # to the workers too, as from a terminal
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert output == ''
    message = errors.strip().splitlines()[-1]
    assert message.startswith(f'sem-timm: {number.name} stopped the training after step ')
    assert message.endswith(f'goes on with: sem-timm finetune --resume {run}')

    step = len(column(run, 'loss'))
    assert find_checkpoint(run)[1].name.startswith(f'step-{step:09d}')
    assert f'after step {step},' in message
    with pytest.raises(StoppedError):
        finetune(resume=str(run), stop_at=step + 20, progress=False)
    stop_small(images, tmp_path / 'whole', step + 20, epochs=40)
    assert column(run, 'loss') == column(tmp_path / 'whole', 'loss')


@thorough
@pytest.mark.parametrize(
    ('first', 'second'),
    [(signal.SIGINT, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)],
)
def test_second_signal_stops_at_once_and_quietly(
    first: signal.Signals, second: signal.Signals, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / 'run'
    process = start(arguments(images, run, '--epochs', '40', '--workers', '1'))
    wait_for_rows(process, run / 'train.csv', 3)
    os.killpg(process.pid, first)
    # Not two of one kind in one moment, which the system would make one; and until nothing is left that could get one.
    while process.poll() is None:
        time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, second)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (128 + first, ''), errors
    assert errors.strip().splitlines()[-1].startswith(f'sem-timm: {first.name} stopped the training ')
    assert not any(word in errors for word in ('Traceback', 'Exception', 'resource_tracker', 'Warning')), errors
    assert read_state(find_checkpoint(run)[1]).step >= 0


def test_signals_are_remembered_then_obeyed_then_ignored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(StoppedError, match='SIGTERM stopped the training at once') as caught, StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_run_that_is_killed_at_any_moment_goes_on(images: Path, tmp_path: Path) -> None:
    """Ten times kill -9, each at a random moment of a run that does little else than write checkpoints."""
    run, moments = tmp_path / 'run', random.Random(0)
    command = arguments(images, run, '--epochs', '60', '--checkpoint-every', '1', '--keep', '1')
    steps = []
    for _ in range(10):
        before = steps[-1] if steps else 0
        process = start(command)
        wait_for_rows(process, run / 'train.csv', before + moments.randint(2, 6))
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps.append(read_state(find_checkpoint(run)[1]).step)
        assert steps[-1] > before
        command = resume(run)
    assert finish(resume(run, '--stop-at', str(steps[-1] + 3))).returncode == 143
    whole = tmp_path / 'whole'
    finish(arguments(images, whole, '--epochs', '60', '--stop-at', str(steps[-1] + 3)))
    assert column(run, 'loss') == column(whole, 'loss')


@thorough
def test_full_disk_is_named_and_the_last_checkpoint_is_whole(images: Path, tmp_path: Path) -> None:
    """The limit of file sizes makes the system refuse the bytes that do not fit, as a full disk does."""
    run = tmp_path / 'run'
    stop_small(images, run, 2, epochs=3)
    size = (find_checkpoint(run)[1] / 'optimizer.bin').stat().st_size
    full = finish(['bash', '-c', f'ulimit -f {size // 2 // 1024}; exec "$@"', 'bash', *resume(run)])
    assert full.returncode == 2, full.stderr
    message = full.stderr.strip().splitlines()[-1]
    assert message.startswith(f'sem-timm: cannot write {run / "checkpoints"}/step-')
    assert 'GiB are free' in message
    assert [path.name for path in (run / 'checkpoints').iterdir()] != []
    assert not any(path.name.startswith('.') for path in (run / 'checkpoints').iterdir())
    assert read_state(find_checkpoint(run)[1]).step == 2

    assert finetune(resume=str(run), progress=False).num_steps == 18
    run_small(images, tmp_path / 'whole', epochs=3)
    assert column(run, 'loss') == column(tmp_path / 'whole', 'loss')
