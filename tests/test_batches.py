"""What loaders may yield, and what is said about the rest."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sem_timm
from sem_timm.batches import read_batches
from sem_timm.errors import OptionError
from tests.attention_transfer.small_transformer import SIZE, create, swapped

IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.tensor([4, 0, 4])


@pytest.mark.parametrize(
    'loader',
    [
        [(IMAGES, LABELS)],
        [[IMAGES, LABELS]],
        [{'pixel_values': IMAGES, 'labels': LABELS}],
        [{'img': IMAGES, 'fine_label': LABELS}],
        [UserDict(image=IMAGES, label=LABELS)],
        ((IMAGES, LABELS, 'more') for _ in range(1)),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3),
    ],
)
def test_pairs_and_dictionaries_give_images_and_labels(loader: Any) -> None:
    ((images, labels),) = read_batches(loader)
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)


@pytest.mark.parametrize('loader', [IMAGES, [IMAGES], [(IMAGES,)], [{'x': IMAGES}]])
def test_images_may_come_without_labels(loader: Any) -> None:
    ((images, labels),) = read_batches(loader)
    assert torch.equal(images, IMAGES) and labels is None


def test_empty_batches_are_passed_over() -> None:
    assert len(list(read_batches([IMAGES[:0], IMAGES]))) == 1


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        (3, 'yields no batches'),
        ('folder', 'yields no batches'),
        ({'image': IMAGES}, 'yields no batches'),
        ([{'picture': IMAGES}], "with 'picture'"),
        ([('path', 1)], 'type str'),
        (TensorDataset(IMAGES, LABELS), 'DataLoader'),
        ([IMAGES.byte()], 'uint8'),
        ([torch.zeros(3, 5)], r'\(3, 5\)'),
    ],
)
def test_what_holds_no_images_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(read_batches(loader))


@pytest.mark.parametrize('form', [lambda x: x, lambda x: [{'img': x}], lambda x: [UserDict(image=x)]])
def test_all_that_read_loaders_take_the_same(form: Any) -> None:
    images = torch.randn(2, *SIZE)
    loader, model = form(images), swapped(model=sem_timm.patch_model(create(), 'sem', input_size=SIZE))
    assert sem_timm.decisions(model, loader).num_images == 2
    result = sem_timm.transfer(model, loader, evaluation=loader)
    assert [stage.images_seen for stage in result.stages[-2:]] == [2, 2]
