"""Labels of images, and what is said where they name no class."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from sem_timm.errors import OptionError
from sem_timm.reports.labels import labelled_batches

IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.tensor([4, 0, 4])


@pytest.mark.parametrize('labels', [LABELS, [4, 0, 4], (4, 0, 4), LABELS.numpy(), [*LABELS], [*LABELS.numpy()]])
def test_labels_are_listed_where_they_are_wanted(labels: Any) -> None:
    ((images, found),) = labelled_batches([(IMAGES, labels)], with_labels=True)
    assert torch.equal(images, IMAGES) and found == [4, 0, 4] and {*map(type, found)} == {int}


@pytest.mark.parametrize('loader', [[(IMAGES,)], [(IMAGES, torch.rand(3, 10))]])
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


@pytest.mark.parametrize('loader', [[], [IMAGES[:0]]])
def test_a_loader_without_images_is_refused(loader: Any) -> None:
    with pytest.raises(OptionError, match='no images'):
        list(labelled_batches(loader, with_labels=False))


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (None, 'images alone'),
        (torch.rand(3, 10), 'one class per image'),
        (torch.rand(3), 'one class per image'),
        (torch.eye(3).to_sparse(), r'shape \(3, 3\)'),
        ([1, 2], '2 labels of 3 images'),
        ([[1], [2], [3]], 'one class per image'),
        ([*torch.eye(3)], 'type list of Tensor; leave mixup and one-hot'),
        ([*torch.rand(3)], 'one class per image'),
        ([0.1, 0.2, float('nan')], 'type list of float'),
        (numpy.eye(3), r'shape \(3, 3\) and float64'),
        (numpy.array(3), r'shape \(\) and int64'),
        (3, 'type int'),
        ('cat', 'type str'),
        ({0: 'cat', 1: 'dog', 2: 'cat'}, 'type dict'),
        ([('cat', [1])] * 3, 'type list of tuple'),
    ],
)
def test_labels_that_name_no_class_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(labelled_batches([(IMAGES, labels)], with_labels=True))
