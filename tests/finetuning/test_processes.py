"""Two processes that train together compute what one computes with the same images in an update."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sem_timm.finetuning.checkpoints import find_checkpoint, read_state
from tests.finetuning.processes import arguments, finish, resume
from tests.finetuning.small_runs import column
from tests.thorough import thorough

# Sums in another order: float32 keeps 7 digits, and the loss of a few steps loses one or two of them.
TOLERANCE = 2e-5

VIT = ('--operation', 'external', '--set', 'memory=8', '--image-size', '32')
STAGES = ('--unfreeze-every', '0.5', '--layer-decay', '0.8', '--new-lr-scale', '3', '--ema', '0.9')


def launched(command: list[str]) -> list[str]:
    """The command on two processes, which find each other on this machine."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    return [*launcher, *command[1:]]


def vit(command: list[str]) -> list[str]:
    return ['test_vit' if word == 'test_resnet' else word for word in command]


@pytest.mark.parametrize(
    'case', [pytest.param('plain', marks=thorough), pytest.param('stages', marks=pytest.mark.slow)]
)
def test_two_processes_have_the_losses_of_one(case: str, images: Path, tmp_path: Path) -> None:
    """On a transformer, which has no batch norm: that would see the images of its own process only."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    given = (*VIT, '--epochs', '2', '--no-progress', *(STAGES if case == 'stages' else ()))
    first = finish(vit(arguments(images, one, *given)))
    assert first.returncode == 0, first.stderr
    second = finish(launched(vit(arguments(images, two, *given))))
    assert second.returncode == 0, second.stderr
    assert second.stdout.count('accuracy') == 1  # printed by the first process only
    expected = [float(loss) for loss in column(one, 'loss')]
    assert len(expected) == 12 and expected[0] > expected[-1]
    assert [float(loss) for loss in column(two, 'loss')] == pytest.approx(expected, rel=TOLERANCE)
    measured = [float(loss) for loss in column(one, 'loss', 'validation')]
    assert [float(loss) for loss in column(two, 'loss', 'validation')] == pytest.approx(measured, rel=TOLERANCE)
    assert column(two, 'accuracy', 'validation') == column(one, 'accuracy', 'validation')


@pytest.mark.slow
def test_two_processes_stop_and_go_on_exactly(images: Path, tmp_path: Path) -> None:
    """Batch norm, drop path and mixup differ between the processes, and all are restored."""
    given = ('--epochs', '2', '--model-options', 'drop_path_rate=0.2', '--mixup', '0.5', '--no-progress')
    whole, run = tmp_path / 'whole', tmp_path / 'run'
    assert finish(launched(arguments(images, whole, *given))).returncode == 0
    stopped = finish(launched(arguments(images, run, *given, '--stop-at', '4')))
    assert 'SIGTERM stopped the training after step 4' in stopped.stderr
    assert read_state(find_checkpoint(run)[1]).num_processes == 2
    alone = finish(resume(run))
    assert alone.returncode == 2
    assert 'was saved by 2 processes, and now there are 1' in alone.stderr
    again = finish(launched(resume(run, '--no-progress')))
    assert again.returncode == 0, again.stderr
    assert column(run, 'loss') == column(whole, 'loss')


@pytest.mark.slow
def test_sharded_weights_are_put_together() -> None:
    done = finish(launched([sys.executable, '-m', 'tests.finetuning.sharded']))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['whole', 'whole']
