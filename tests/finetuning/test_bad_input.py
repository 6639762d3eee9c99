"""Data, options and numbers that training cannot go on with: each an error that names it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import sem_timm
from sem_timm.errors import OptionError
from sem_timm.finetuning import DataError, DivergedError, FinetuneOptions, WriteError, files, finetune, open_run
from tests.finetuning.small_runs import CLASSES, NUM_VALIDATION, column, options, run_small, stop_small, write_images


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_image_is_named(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = write_images(tmp_path / 'data') / 'train' / 'cross' / '3.png'
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        run_small(tmp_path / 'data', tmp_path / 'run', workers=workers)
    message = str(caught.value)
    assert message.startswith(f'cannot read image {broken}: ') and '--skip-bad-images' in message
    assert caught.value.__cause__ is not None or workers
    # Nothing was skipped, and timm does not say so.
    assert caplog.text == '' and capfd.readouterr().err == ''
    assert '\n' not in message


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_skipped_and_counted_on_request(workers: int, tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data')
    broken = [folder / 'train' / 'cross' / '3.png', folder / 'validation' / 'square' / '0.png']
    broken[0].write_text('no image')
    broken[1].write_bytes(b'')
    result = run_small(folder, tmp_path / 'run', epochs=3, workers=workers, skip_bad_images=True)
    assert result.bad_images == tuple(map(str, broken))
    assert result.num_steps == 18 and result.classes == CLASSES
    assert result.num_images == (48, 3 * NUM_VALIDATION - 1)
    # The one that cannot be read is not measured in the guise of another.
    run = open_run(result.folder)
    labels = [int(label) for _, batch in run.validation for label in batch]
    assert len(labels) == 3 * NUM_VALIDATION - 1
    assert (result.after * len(labels)) % 1 == pytest.approx(0, abs=1e-6)


def test_a_run_that_met_an_unreadable_image_goes_on_without_it(tmp_path: Path) -> None:
    broken = write_images(tmp_path / 'data') / 'train' / 'cross' / '3.png'
    broken.write_text('no image')
    with pytest.raises(DataError):
        run_small(tmp_path / 'data', tmp_path / 'run')
    result = finetune(resume=str(tmp_path / 'run'), skip_bad_images=True, progress=False)
    assert result.bad_images == (str(broken),)


def test_images_that_were_skipped_before_a_stop_are_told_after_it(tmp_path: Path) -> None:
    broken = write_images(tmp_path / 'data') / 'train' / 'cross' / '3.png'
    broken.write_text('no image')
    # Step 12 is the last: after it validation images alone are read, so that only the state knows what was skipped.
    stop_small(tmp_path / 'data', tmp_path / 'run', 12, skip_bad_images=True)
    assert finetune(resume=str(tmp_path / 'run'), progress=False).bad_images == (str(broken),)


def test_a_single_class_is_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data', splits=False)
    for name in CLASSES[1:]:
        shutil.rmtree(folder / name)
    with pytest.raises(DataError, match="single class, 'circle'"):
        run_small(folder, tmp_path / 'run')


def test_folder_in_which_no_image_can_be_read_is_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data')
    for file in (folder / 'train').rglob('*.png'):
        file.write_text('no image')
    with pytest.raises(DataError, match='48 images in a row cannot be read'):
        run_small(folder, tmp_path / 'run', skip_bad_images=True)


def test_images_for_validation_alone_are_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data')
    (folder / 'train').rename(folder / 'learn')
    with pytest.raises(DataError, match=r'validation, and none for training, .* there is learn, validation'):
        run_small(folder, tmp_path / 'run')
    assert run_small(folder, tmp_path / 'run', train_split='learn').num_steps


@pytest.mark.parametrize('split', ['train_split', 'validation_split'])
def test_split_that_a_folder_does_not_have_is_an_error(images: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="has no folder for split 'tset'; there is train, validation"):
        run_small(images, tmp_path / 'run', **{split: 'tset'})


def test_classes_of_both_splits_must_be_the_same(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data')
    (folder / 'validation' / 'cross').rename(folder / 'validation' / 'kreuz')
    with pytest.raises(DataError, match='In one only: cross, kreuz'):
        run_small(folder, tmp_path / 'run')


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'model': 'resnett18'}, "model 'resnett18' is unknown. Close: resnet18"),
        ({'model_options': {'colour': 1}}, "model 'test_resnet' cannot be created: .*colour"),
        ({'operation': 'semm'}, "operation 'semm' is unknown. Close: sem"),
        ({'optimizer': 'adamx'}, "optimizer 'adamx'"),
        ({'accumulate': 3}, 'cannot be computed in accumulate=3 equal parts'),
        ({'batch_size': 3, 'mixup': 0.5}, 'an even number of images at a time, not 3'),
        ({'num_classes': 2}, 'num_classes=2, but .* has 3 classes'),
        ({'precision': 'fp16'}, "precision='fp16' needs a GPU. Use bf16"),
        ({'sync_bn': True}, 'sync_bn needs GPUs'),
        ({'epoch': 3}, 'epoch'),
        ({'epochs': 1.5}, r'epochs=1\.5 is no whole number'),
        ({'auto_augment': 'foo'}, "auto_augment='foo' is no policy of timm: .*Such as rand-m9"),
        ({'model_options': {'num_classes': 0}}, 'num_classes is that of the data; for more than it has: --num-classes'),
        ({'model_options': {'in_chans': 4}}, 'takes images of 4 channels; they are read as RGB'),
        ({'model': nn.Identity()}, 'model is a text, not Identity. A network of your own is given as network='),
    ],
)
def test_option_without_meaning_is_refused_before_anything_is_written(
    given: dict[str, Any], part: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=part):
        run_small(images, tmp_path / 'run', **given)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'epochs': 0}, 'epochs=0 is out of range: it must be at least 1'),
        ({'lr': float('nan')}, 'lr=nan is out of range'),
        ({'weight_decay': float('inf')}, 'weight_decay=inf is out of range: it must be finite'),
        ({'seed': 2**32}, 'seed=4294967296 is out of range: it must be below'),
        ({'epochs': '3'}, "epochs='3' is no whole number"),
        ({'scale': 1.5}, 'scale=1.5 is out of range: it must be from 0 to 1'),
        ({'ema': 1.0}, 'ema=1.0 is out of range'),
        ({'ema': 'x'}, "ema='x' is no number"),
        ({'smoothing': None}, 'smoothing=None is no number'),
        ({'scale': '0.5'}, "scale='0.5' is no number"),
        ({'schedule': 'cosin'}, "schedule='cosin' is unknown. Close: cosine"),
        ({'operation': 'none', 'target': 'layer1'}, 'takes no target'),
        ({'freeze_base': True, 'unfreeze_every': 1.0}, 'exclude each other'),
    ],
)
def test_options_check_themselves(given: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError, match=part):
        FinetuneOptions(**given)


def test_paths_and_numbers_of_numpy_are_texts_and_numbers() -> None:
    """As they come out of `pathlib` and a sweep over an array."""
    given: dict[str, Any] = {'data': Path('photos'), 'output': Path('run'), 'lr': np.float32(0.5), 'seed': np.int64(3)}
    asked = FinetuneOptions(**given)
    assert asked == FinetuneOptions(data='photos', output='run', lr=0.5, seed=3, clip=float('inf'))
    assert FinetuneOptions.from_json(asked.to_json()) == asked


def test_a_batch_of_one_number_per_channel_is_told(images: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r'learns nothing from one number per channel.*Give a larger --batch-size'):
        run_small(images, tmp_path / 'run', batch_size=1)


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'validation_fraction': 1.0}, 'has no images left for training; try a smaller --validation-fraction'),
        ({'batch_size': 64, 'accumulate': 4}, 'Give a smaller one, such as 4.'),
    ],
)
def test_an_error_about_too_few_images_tells_what_helps(given: dict[str, Any], part: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data', splits=False)
    with pytest.raises(DataError) as caught:
        run_small(folder, tmp_path / 'run', **given)
    assert part in str(caught.value)


def test_one_tracker_needs_no_tuple() -> None:
    assert FinetuneOptions(trackers='none').trackers == ()
    assert FinetuneOptions(trackers='wandb').trackers == ('wandb',)


def test_options_come_back_from_text() -> None:
    told = FinetuneOptions(operation_options={'operators': ('se', 'eca')}, target=('layer1.0',), ema=0.9)
    assert FinetuneOptions.from_json(told.to_json()) == told
    with pytest.raises(OptionError, match=r"option 'epoch' is unknown. Close: epochs"):
        FinetuneOptions.from_json('{"epoch": 3}')


def test_every_option_says_what_it_is() -> None:
    text = FinetuneOptions.__doc__ or ''
    assert all(f'    {name}: ' in text for name in FinetuneOptions.__dataclass_fields__)


class Poisoned(nn.Module):
    """A model whose gradient, or whose loss, is not a number from its third call on."""

    def __init__(self, *, loss: bool) -> None:
        super().__init__()
        self.pretrained_cfg = {'input_size': (3, 16, 16), 'classifier': 'head'}
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.loss = loss
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        hidden = self.body(images.mean((2, 3)))
        if self.calls >= 3:
            # The square root of zero is a number, and its slope is not.
            hidden = hidden * float('nan') if self.loss else hidden + (hidden * 0).sqrt()
        return self.head(hidden)


@pytest.mark.parametrize('loss', [True, False])
def test_what_is_no_number_is_told_with_step_and_group(loss: bool, images: Path, tmp_path: Path) -> None:
    given = options(images, tmp_path / 'run', operation='none', checkpoint_every=1)
    with pytest.raises(DivergedError) as caught:
        finetune(network=Poisoned(loss=loss), **given)
    message = str(caught.value)
    assert message.startswith('the loss is nan at step 3.' if loss else 'the norm of the gradient is nan at step 3.')
    assert 'base, weight decay, learning rate x 1 (body.weight)' in message
    assert message.endswith('step-000000002 --lr 0.0001.')
    assert len(column(tmp_path / 'run', 'loss')) == 2


def test_weights_that_were_no_numbers_before_are_told(images: Path, tmp_path: Path) -> None:
    network = Poisoned(loss=False)
    nn.init.constant_(network.head.bias, float('inf'))
    with pytest.raises(DivergedError, match=r'weights that are not finite: base, no weight decay.*\(head.bias\)'):
        finetune(network=network, **options(images, tmp_path / 'run', operation='none'))


def test_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / 'weights'
    files.write_whole(file, lambda path: path.write_text('old'))

    def fail(path: Path) -> None:
        path.write_text('ne')
        raise OSError(28, 'No space left on device')

    with pytest.raises(WriteError, match=f'cannot write {file}: No space left on device .* GiB are free'):
        files.write_whole(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ['weights'] and file.read_text() == 'old'


def test_folder_that_cannot_be_flushed_is_no_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, 'Invalid argument')
        flush(descriptor)

    monkeypatch.setattr(os, 'fsync', fail)
    files.write_text(tmp_path / 'file', 'new')
    files.begin_folder(tmp_path / 'folder')
    (files.unfinished_name(tmp_path / 'folder') / 'part').write_text('new')
    files.finish_folder(tmp_path / 'folder')
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['file', 'folder', 'part']


def test_two_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / 'file'

    def write(path: Path) -> None:
        path.write_text('one')
        files.write_text(file, 'two')

    files.write_whole(file, write)
    assert file.read_text() == 'one' and [path.name for path in tmp_path.iterdir()] == ['file']


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, young, folder = (tmp_path / f'.unfinished-{name}' for name in ('old', 'young', 'folder'))
    old.touch()
    young.touch()
    folder.mkdir()
    os.utime(old, (0, 0))
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_log_that_cannot_be_written_is_named(images: Path, tmp_path: Path) -> None:
    class Vandal(Poisoned):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                (tmp_path / 'run' / 'train.csv').mkdir(exist_ok=True)
            return super().forward(images)

    with pytest.raises(WriteError, match=r'cannot write .*train\.csv'):
        finetune(network=Vandal(loss=False), **options(images, tmp_path / 'run', operation='none'))


def test_a_failed_run_leaves_no_signal_handler(images: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(OptionError):
        run_small(images, tmp_path / 'run', optimizer='adamx')
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_public_names_are_those_of_the_package() -> None:
    assert sem_timm.finetune is finetune and sem_timm.FinetuneOptions is FinetuneOptions


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'data': 'torch/cifar10'}, 'needs --data-root'),
        ({'modle': 'resnet18'}, "option 'modle' is unknown. Close: model"),
    ],
)
def test_options_that_cannot_be_followed(given: dict[str, Any], part: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=part):
        finetune(**{**options(images, tmp_path / 'run'), **given})
