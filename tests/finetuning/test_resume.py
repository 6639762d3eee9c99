"""A run that is stopped and resumed is the run that was not stopped, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from sem_timm.errors import OptionError
from sem_timm.finetuning import CheckpointError, StoppedError, finetune
from sem_timm.finetuning.checkpoints import Checkpoints, find_checkpoint
from tests.finetuning.small_runs import column, run_small, stop_small
from tests.lively import lively
from tests.thorough import first_of_each

EVERYTHING_RANDOM = {
    'model_options': {'drop_rate': 0.3, 'drop_path_rate': 0.2},
    'auto_augment': 'rand-m5-mstd0.5',
    'random_erasing': 0.5,
    'mixup': 0.4,
    'cutmix': 0.4,
    'ema': 0.9,
    'scale': 0.3,
}
CASES = {
    'everything random': EVERYTHING_RANDOM,
    'workers': {'workers': 2, 'scale': 0.3, 'random_erasing': 0.5},
    'unfreezing': {'unfreeze_every': 0.5, 'layer_decay': 0.7, 'new_lr_scale': 5.0, 'accumulate': 2},
    'momentum, plain': {'optimizer': 'sgd', 'schedule': 'constant', 'operation': 'none'},
    # Of a transformer: torch's bf16 convolutions on CPUs now and then have infinite gradients at this size.
    'bf16': {'model': 'test_vit', 'operation': 'external', 'image_size': 32, 'precision': 'bf16'},
    'channels last': {'channels_last': True, 'clip': 0.5, 'freeze_base': True},
}


def forget() -> None:
    """Moves all random generators, as another process would have them."""
    random.seed(77)
    np.random.seed(77)
    torch.manual_seed(77)


@pytest.mark.parametrize('case', first_of_each(CASES))
def test_resumed_run_has_the_losses_and_weights_of_the_uninterrupted_one(
    case: str, images: Path, tmp_path: Path
) -> None:
    # With branches that are not zero, so that gates learn where nothing but them does.
    torch.save(lively(timm.create_model('test_resnet', num_classes=3)).state_dict(), tmp_path / 'weights.pth')
    frozen = {'weights': str(tmp_path / 'weights.pth'), 'pretrained': None} if 'freeze_base' in CASES[case] else {}
    given = {'epochs': 4, **CASES[case], **frozen}
    whole = run_small(images, tmp_path / 'whole', **given)
    # Once in the middle of an epoch, once at its end before the measurement, 20 updates before the end at first.
    stop_small(images, tmp_path / 'parts', 4, **given)
    forget()
    with pytest.raises(Exception, match='SIGTERM stopped the training after step 12'):
        finetune(resume=str(tmp_path / 'parts'), stop_at=12, progress=False)
    forget()
    parts = finetune(resume=str(tmp_path / 'parts'), progress=False)

    assert len(column(tmp_path / 'whole', 'loss')) == 24
    for name in ('step', 'loss', 'learning_rate', 'gradient_norm'):
        assert column(tmp_path / 'parts', name) == column(tmp_path / 'whole', name), name
    assert column(tmp_path / 'parts', 'accuracy', 'validation') == column(tmp_path / 'whole', 'accuracy', 'validation')
    assert parts.history == whole.history and parts.before == whole.before
    expected = load_file(whole.folder / 'model.safetensors')
    for name, tensor in load_file(parts.folder / 'model.safetensors').items():
        assert torch.equal(tensor, expected[name]), name


def test_any_checkpoint_can_be_resumed_from(images: Path, tmp_path: Path) -> None:
    whole = run_small(images, tmp_path / 'run', checkpoint_every=2, keep=4)
    found = sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').glob('step-*'))
    losses = column(tmp_path / 'run', 'loss')
    again = finetune(resume=str(tmp_path / 'run' / 'checkpoints' / found[0]), progress=False)
    assert column(tmp_path / 'run', 'loss') == losses
    assert again.history == whole.history


@pytest.mark.parametrize('keep', [1, 2])
def test_run_that_goes_on_from_an_earlier_checkpoint_leaves_the_later_ones(
    keep: int, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / 'run'
    run_small(images, run, epochs=3, checkpoint_every=2, keep=9)
    folder = run / 'checkpoints'
    (folder / 'best.json').write_text('{"checkpoint": "step-000000018-epoch-3", "accuracy": 1.0}')
    with pytest.raises(StoppedError):
        finetune(resume=str(folder / 'step-000000008'), keep=keep, stop_at=9, progress=False)
    # What is printed then, --resume with the run, goes on from where it was stopped.
    assert find_checkpoint(run) == (run, folder / 'step-000000009')
    assert {path.name for path in folder.glob('step-*')} <= {
        'step-000000006-epoch-1',
        *('step-000000008', 'step-000000009')[-keep:],
    }
    assert json.loads((folder / 'best.json').read_text())['checkpoint'] == 'step-000000006-epoch-1'
    assert Checkpoints(run).best() == folder / 'step-000000006-epoch-1'
    with pytest.raises(StoppedError):
        finetune(resume=str(folder / 'step-000000006-epoch-1'), stop_at=7, progress=False)
    assert [path.name for path in Checkpoints(run).all()] == ['step-000000006-epoch-1', 'step-000000007']


def test_run_that_goes_on_from_its_beginning_has_no_best_checkpoint_yet(images: Path, tmp_path: Path) -> None:
    run_small(images, tmp_path / 'run', epochs=1, keep=9)
    first = Checkpoints(tmp_path / 'run').all()[0]
    with pytest.raises(StoppedError):
        finetune(resume=str(first), stop_at=1, progress=False)
    assert Checkpoints(tmp_path / 'run').best() is None
    assert finetune(resume=str(tmp_path / 'run'), progress=False).best_checkpoint is not None


def test_finished_run_is_finished_when_resumed(images: Path, tmp_path: Path) -> None:
    whole = run_small(images, tmp_path / 'run')
    again = finetune(resume=str(tmp_path / 'run'), progress=False)
    assert again.to_dict() == {**whole.to_dict(), 'seconds': again.seconds}


def test_last_and_best_checkpoints_are_kept(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', epochs=5, keep=1)
    names = sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').glob('step-*'))
    first_best = next(entry for entry in result.history if entry['accuracy'] == result.best)
    best = f'step-{first_best["step"]:09.0f}-epoch-{first_best["epoch"]:.0f}'
    assert names == sorted({best, 'step-000000030-epoch-5'})
    assert result.best_checkpoint == tmp_path / 'run' / 'checkpoints' / best


def test_options_of_a_resumed_run_cannot_change(images: Path, tmp_path: Path) -> None:
    stop_small(images, tmp_path / 'run', 2)
    with pytest.raises(
        OptionError, match=r'leave out weight_decay\. What may change: checkpoint_every, clip, .*, stop_at, workers\.'
    ):
        finetune(resume=str(tmp_path / 'run'), weight_decay=3.0)


def test_run_goes_on_with_another_learning_rate_and_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'run'
    stop_small(images, run, 4, lr=0.5, new_lr_scale=2.0)
    # Be it the default, which the run was not begun with.
    with pytest.raises(StoppedError):
        finetune(resume=str(run), lr=1e-3, new_lr_scale=3.0, clip=1.0, stop_at=8, progress=True)
    printed = ' '.join(capsys.readouterr().err.split())
    assert 'from here on it is another run than the one that was begun: clip 1.0 instead of None, ' in printed
    assert 'lr 0.001 instead of 0.5, new_lr_scale 3.0 instead of 2.0' in printed
    assert 'new modules, weight decay, learning rate x 3' in printed
    rates = [float(rate) for rate in column(run, 'learning_rate')]
    assert max(rates[:4]) > 0.1 and max(rates[4:]) <= 1e-3
    # It is the run from now on.
    result = finetune(resume=str(run))
    assert (result.options.lr, result.options.new_lr_scale, result.options.clip) == (1e-3, 3.0, 1.0)
    assert 'another run' not in capsys.readouterr().err
    optimizer = torch.load(find_checkpoint(run)[1] / 'optimizer.bin', weights_only=False)
    scales = {group['name'].split(',')[0]: group['lr_scale'] for group in optimizer['param_groups']}
    assert scales == {'base': 1.0, 'new modules': 3.0}


def test_run_without_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is no folder of a run'):
        finetune(resume=str(tmp_path / 'none'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointError, match='has no complete checkpoint'):
        finetune(resume=str(tmp_path / 'empty'))


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.bin', 'random_numbers_0.pt', 'state.json'])
def test_damaged_checkpoint_is_named_with_the_others(file: str, images: Path, tmp_path: Path) -> None:
    stop_small(images, tmp_path / 'run', 8)
    damaged = sorted((tmp_path / 'run' / 'checkpoints').glob('step-*'))[-1]
    (damaged / file).write_bytes((damaged / file).read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r'step-000000008 is damaged.*Others: step-000000006-epoch-1') as caught:
        finetune(resume=str(tmp_path / 'run'), progress=False)
    assert str(damaged) in str(caught.value)


def test_run_does_not_overwrite_another(images: Path, tmp_path: Path) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'thesis.txt').write_text('mine')
    with pytest.raises(OptionError, match='is not empty; name another --output'):
        run_small(images, tmp_path / 'run')
    assert (tmp_path / 'run' / 'thesis.txt').read_text() == 'mine'
    stop_small(images, tmp_path / 'begun', 2)
    with pytest.raises(OptionError, match=f'is not empty; continue it with --resume {tmp_path / "begun"}, or name'):
        run_small(images, tmp_path / 'begun')
