"""Data that cannot be opened: each an error in one line that says what to do."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sem_timm.errors import MissingPackageError
from sem_timm.finetuning import DataError, finetune
from sem_timm.finetuning.samples import LabelCheck
from tests.finetuning.small_runs import options, run_small


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'data': 'nowhere'}, "data 'nowhere' is no file or folder here"),
        ({'data': ''}, "data '' is no file or folder here"),
        ({'data': __file__}, 'is a file, and no .tar'),
        ({'data': str(Path(__file__).parents[1] / 'layers')}, 'Found 0 images .* one folder of images'),
        ({'data': 'torch/cifar100', 'data_root': '/nowhere'}, 'Dataset not found .* Fetch it with --download; or put'),
        ({'data': 'torch/cifar1', 'data_root': '/nowhere'}, 'Unknown torchvision dataset cifar1. Close: cifar10, '),
        ({'data': 'torch/imagenet', 'data_root': '/nowhere'}, 'corrupted. Put its files into --data-root /nowhere'),
        ({'data': 'wds/nowhere'}, "there is no folder 'nowhere' here. Type wds/ and then the folder"),
        (
            {'batch_size': 49},
            'has 48 images for training, fewer than one update takes: --batch-size 49. Give a smaller one, such as 6',
        ),
    ],
)
def test_data_that_is_not_there_or_too_small(
    given: dict[str, Any], part: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=part) as caught:
        finetune(**{**options(images, tmp_path / 'run'), **given})
    assert '\n' not in str(caught.value) and capfd.readouterr() == ('', '')
    assert not (tmp_path / 'run').exists()


def test_tar_that_is_damaged(images: Path, tmp_path: Path) -> None:
    file = tmp_path / 'images.tar'
    file.write_bytes(b'x' * 2000)
    with pytest.raises(DataError, match=r'images\.tar.*cut off, damaged or no tar\. Make it anew') as caught:
        run_small(file, tmp_path / 'run')
    assert isinstance(caught.value.__cause__, tarfile.TarError)
    with tarfile.open(file, 'w') as archive:
        archive.add(images / 'train', arcname='.')
    with tarfile.open(file) as archive:
        member = next(entry for entry in archive if entry.isfile())
    content = bytearray(file.read_bytes())
    content[member.offset_data : member.offset_data + 512] = bytes(512)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r'cannot read image .*png: cannot identify image file'):
        run_small(file, tmp_path / 'run', validation_fraction=0.02)


@pytest.mark.parametrize(
    ('data', 'package'),
    [
        ('hfds/beans', 'datasets'),
        ('hfids//there', 'datasets'),
        ('wds/there', 'webdataset'),
        ('tfds/mnist', 'tensorflow'),
    ],
)
def test_package_that_data_needs_is_named(
    data: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there').mkdir()
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(MissingPackageError, match=f'Do: pip install {package}$') as caught:
        run_small(data, tmp_path / 'run')
    assert data in str(caught.value) and isinstance(caught.value.__cause__, ImportError)
    assert capfd.readouterr() == ('', '')


def test_labels_beyond_the_classes_are_told() -> None:
    check = LabelCheck('wds/shards', 3)
    assert [check(label) for label in (0, 2)] == [0, 2]
    with pytest.raises(
        DataError, match='has the label 3, and the labels of 3 classes are 0 to 2; give --num-classes 4'
    ):
        check(3)
