"""From data to batches: every image once, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import gzip
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sem_timm.finetuning import DataError, FinetuneOptions
from sem_timm.finetuning.builtin import Digits, FashionMnist
from sem_timm.finetuning.datasets import open_data
from sem_timm.finetuning.samples import LabelCheck, Samples, own_random_numbers
from sem_timm.finetuning.sampling import Share, TrainingBatches, ValidationBatches
from tests.finetuning.small_runs import CLASSES, NUM_TRAIN, NUM_VALIDATION, run_small, write_images


def test_digits_are_split_without_overlap_and_fixed() -> None:
    train, validation = Digits(train=True), Digits(train=False)
    assert (len(train), len(validation)) == (1437, 360)
    pixels = {image.tobytes() for part in (train, validation) for image, _ in map(part.__getitem__, range(len(part)))}
    assert len(pixels) == 1797
    assert {label for _, label in map(validation.__getitem__, range(360))} == set(range(10))


@pytest.mark.parametrize(('num_processes', 'accumulate'), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_updates_hold_the_same_images_however_they_are_shared(num_processes: int, accumulate: int) -> None:
    whole = TrainingBatches(70, Share(0, 1, 16), seed=3)
    whole.epoch = 5
    expected = [sorted(batch) for batch in whole]
    assert len(expected) == whole.num_updates == 4
    assert len({key for batch in expected for key in batch}) == 64
    updates: list[list[tuple[int, int]]] = [[] for _ in range(2)]
    for rank in range(num_processes):
        part = TrainingBatches(70, Share(rank, num_processes, 16, accumulate), seed=3)
        part.epoch, part.start = 5, 2
        batches = list(part)
        assert len(batches) == len(part) == 2 * accumulate
        for number, batch in enumerate(batches):
            updates[number // accumulate] += batch
    assert [sorted(update) for update in updates] == expected[2:]


def test_epochs_have_orders_of_their_own() -> None:
    batches = TrainingBatches(64, Share(0, 1, 64), seed=0)
    orders = []
    for epoch in (0, 1, 0):
        batches.epoch = epoch
        orders.append([position for _, position in next(iter(batches))])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(64))


@pytest.mark.parametrize(('number', 'processes', 'size'), [(15, 1, 4), (15, 2, 4), (3, 4, 2), (16, 2, 8)])
def test_validation_counts_every_image_once(number: int, processes: int, size: int) -> None:
    parts = [ValidationBatches(number, rank, processes, size) for rank in range(processes)]
    assert len({len(list(part)) for part in parts}) == 1
    counted = [key[1] for part in parts for i, batch in enumerate(part) for key in batch[: part.num_real(i)]]
    assert sorted(counted) == list(range(number))


def test_samples_have_random_numbers_of_their_own_and_leave_the_others_alone() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    before = random.getstate(), torch.get_rng_state()
    with own_random_numbers((0, 1, 2)):
        first = draw()
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    draw()
    with own_random_numbers((0, 1, 2)):
        assert draw() == first
    with own_random_numbers((0, 2, 2)):
        assert draw() != first


def test_folder_without_splits_holds_images_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data', splits=False)
    data = open_data(FinetuneOptions(data=str(folder), batch_size=8, validation_fraction=0.25))
    assert data.held_out and data.num_classes == 3
    assert (len(data.train), len(data.validation)) == (36, 12)
    assert not {*data.train.indices} & {*data.validation.indices}


@pytest.mark.parametrize('name', ['{}', 'torch/image_folder'])
@pytest.mark.parametrize('other', ['', 'test'])
def test_folder_with_images_for_training_alone_holds_some_of_them_out(tmp_path: Path, other: str, name: str) -> None:
    folder = write_images(tmp_path / 'data')
    if other:
        (folder / 'validation').rename(folder / other)
    else:
        shutil.rmtree(folder / 'validation')
    data = open_data(FinetuneOptions(data=name.format(folder), data_root=str(folder), batch_size=8))
    names = [{part.name(position) for position in range(len(part))} for part in (data.train, data.validation)]
    assert data.held_out and not names[0] & names[1]
    assert names[0] | names[1] == {str(file) for file in (folder / 'train').rglob('*.png')}


@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_of_sixteen_bits_the_upper_eight_are_seen(ending: str, tmp_path: Path) -> None:
    """PIL by itself makes them white."""
    folder = tmp_path / 'images' / 'wide'
    folder.mkdir(parents=True)
    pixels = np.linspace(0, 65535, 48).reshape(6, 8)
    Image.fromarray(pixels.astype(np.uint16)).save(folder / f'image.{ending}')
    sources: list[Any] = [[(Image.open(folder / f'image.{ending}'), 0)]]
    if ending == 'png':  # the others are no images to timm's folders
        sources.append(timm.data.ImageDataset(str(tmp_path / 'images')))
    for data in sources:
        for mode, shape in (('RGB', (6, 8, 3)), ('L', (6, 8))):
            samples = Samples(data, 0, int)
            samples.mode = mode
            seen = np.asarray(samples[0, 0][0])
            assert seen.shape == shape and np.abs(seen.T - pixels.T / 257).max() <= 0.5


@pytest.mark.parametrize(
    'pixels',
    [
        np.float32(0.7),
        np.float32(700),
        np.float32('nan'),
        np.int32(-1),
        np.int32(70000),
        np.uint16(4095),  # 12 bits
    ],
    ids=str,
)
def test_pixels_whose_range_nobody_knows_are_told(pixels: Any) -> None:
    image = Image.fromarray(np.full((4, 4), pixels))
    with pytest.raises(DataError, match=r"cannot read image .*: its pixels are numbers from .* of mode '[IF]"):
        Samples([(image, 0)], 0, int)[0, 0]


@pytest.mark.parametrize('dtype', [np.float32, np.int32, np.uint16])
def test_pixels_of_eight_bits_are_seen_whatever_holds_them(dtype: Any) -> None:
    image = Image.fromarray(np.full((4, 4), 70, dtype=dtype))
    assert Samples([(image, 0)], 0, int)[0, 0][0].getpixel((0, 0)) == (70, 70, 70)


@pytest.mark.parametrize('label', [-1, None])
def test_images_without_a_label_are_neither_trained_on_nor_measured(label: int | None) -> None:
    """As test images are, whose classes are not published."""
    pictures = [(Image.new('RGB', (4, 4)), label)] * 3
    for measured in (False, True):
        samples = Samples(pictures, 0, LabelCheck('hfds/mine', 10), measured=measured)
        with pytest.raises(DataError, match='hfds/mine has images without a label'):
            samples[0, 0]


def test_test_images_are_measured_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data')
    (folder / 'validation').rename(folder / 'test')
    data = open_data(FinetuneOptions(data=str(folder), batch_size=8, validation_split='test'))
    numbers = len(data.train) / len(CLASSES), len(data.validation) / len(CLASSES)
    assert not data.held_out and numbers == (NUM_TRAIN, NUM_VALIDATION)


def test_tar_is_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data', splits=False)
    with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
        archive.add(folder, arcname='.')
    result = run_small(tmp_path / 'images.tar', tmp_path / 'run', workers=1)
    assert sum(result.num_images) == 48 and result.num_steps == 2 * (38 // 8)


def test_pictures_of_three_colours_are_learned(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', epochs=8, image_size=32, lr=3e-3)
    assert result.after > 0.9 > result.before


def test_few_images_are_drawn_by_the_seed_and_some_are_held_out_of_them(images: Path) -> None:
    def chosen(**given: Any) -> tuple[list[int], list[int]]:
        data = open_data(FinetuneOptions(data=str(images), batch_size=1, **given))
        return list(data.train.indices), list(data.validation.indices)

    all_train, validation = chosen()
    assert (len(all_train), len(validation)) == (48, 15)
    few = chosen(max_train_images=20)
    assert len(few[0]) == 20 and few == chosen(max_train_images=20) and few[1] == validation
    assert few[0] != chosen(max_train_images=20, seed=1)[0]
    assert chosen(max_train_images=99) == (all_train, validation)
    measured = chosen(max_validation_images=5, split_seed=0)[1]
    assert len(measured) == 5 and {*measured} < {*validation}
    assert measured == chosen(max_validation_images=5, split_seed=0, seed=1)[1]
    tuned, measured = chosen(max_train_images=20, tuning_fraction=0.25)
    assert len(measured) == 5 and sorted(tuned + measured) == few[0]
    assert chosen(tuning_fraction=0.25, split_seed=3, seed=1) == chosen(tuning_fraction=0.25, split_seed=3, seed=2)


def test_what_is_held_out_for_validation_is_never_tuned_on(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'data', splits=False)
    told = FinetuneOptions(data=str(folder), batch_size=1, split_seed=0)
    validation = set(open_data(told).validation.indices)
    for seed in range(3):
        tuned = open_data(replace(told, seed=seed, tuning_fraction=0.5))
        assert not validation & {*tuned.train.indices, *tuned.validation.indices}
        assert len(tuned.validation) == 19


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path) -> None:
    for part, count in (('train', 6), ('t10k', 4)):
        images = np.arange(count * 28 * 28, dtype=np.uint8).reshape(count, 28, 28)
        header = bytes([0, 0, 8, 3]) + np.array(images.shape, '>i4').tobytes()
        (tmp_path / f'{part}-images-idx3-ubyte.gz').write_bytes(gzip.compress(header + images.tobytes()))
        labels = bytes([0, 0, 8, 1]) + np.array([count], '>i4').tobytes() + bytes(range(count))
        (tmp_path / f'{part}-labels-idx1-ubyte').write_bytes(labels)
    data = open_data(FinetuneOptions(data='fashion-mnist', data_root=str(tmp_path), batch_size=2))
    assert (len(data.train), len(data.validation), data.num_classes) == (6, 4, 10)
    image, label = data.validation.dataset[3]
    assert (image.size, image.getpixel((1, 0)), label) == ((28, 28), (3 * 784 + 1) % 256, 3)
    (tmp_path / 't10k-labels-idx1-ubyte').write_bytes(b'\0\0')
    with pytest.raises(DataError, match='t10k-labels-idx1-ubyte is damaged'):
        FashionMnist(tmp_path, train=False)
    with pytest.raises(DataError, match='apt-get install dataset-fashion-mnist'):
        FashionMnist(tmp_path / 'nowhere', train=True)
