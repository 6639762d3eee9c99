"""What loaders may yield, and what is said about the rest."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sem_timm.errors import OptionError
from sem_timm.reports.batches import labelled_batches

IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.tensor([4, 0, 4])


@pytest.mark.parametrize(
    'loader',
    [
        [(IMAGES, LABELS)],
        [[IMAGES, LABELS]],
        [{'pixel_values': IMAGES, 'labels': LABELS}],
        [UserDict(image=IMAGES, label=[4, 0, 4])],
        ((IMAGES, LABELS, 'more') for _ in range(1)),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3),
    ],
)
def test_pairs_and_dictionaries_give_images_and_labels(loader: Any) -> None:
    ((images, labels),) = labelled_batches(loader, with_labels=True)
    assert torch.equal(images, IMAGES) and labels == [4, 0, 4]


@pytest.mark.parametrize('loader', [IMAGES, [IMAGES], [(IMAGES,)], [{'x': IMAGES}], [(IMAGES, torch.rand(3, 10))]])
def test_labels_are_not_looked_at_where_none_are_wanted(loader: Any) -> None:
    ((images, labels),) = labelled_batches(loader, with_labels=False)
    assert torch.equal(images, IMAGES) and labels is None


def test_no_batch_is_fetched_beyond_the_last_one_wanted() -> None:
    fetched = []

    def batches() -> Any:
        for number in range(5):
            fetched.append(number)
            yield IMAGES

    assert len(list(labelled_batches(batches(), with_labels=False, max_batches=2))) == 2
    assert fetched == [0, 1]


def test_empty_batches_are_passed_over() -> None:
    assert len(list(labelled_batches([IMAGES[:0], IMAGES], with_labels=False))) == 1


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        ([], 'no images'),
        ([IMAGES[:0]], 'no images'),
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
        list(labelled_batches(loader, with_labels=False))


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (None, 'images alone'),
        (torch.rand(3, 10), 'one class per image'),
        (torch.rand(3), 'one class per image'),
        ([1, 2], '2 labels of 3 images'),
        ([[1], [2], [3]], 'one class per image'),
    ],
)
def test_labels_that_name_no_class_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(labelled_batches([(IMAGES, labels)], with_labels=True))
