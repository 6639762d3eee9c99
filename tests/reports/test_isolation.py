"""Copies to run in a model's stead, and random generators that are put back."""

from __future__ import annotations

import random

import numpy
import pytest
import timm
import torch

from sem_timm.errors import ModelError
from sem_timm.random_state import preserved_random_state
from sem_timm.reports.isolation import isolated


def test_random_state_is_put_back_after_an_error() -> None:
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    with pytest.raises(OSError), preserved_random_state():
        torch.rand(5), random.random(), numpy.random.rand()
        raise OSError
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected


def test_copy_shares_weights_and_nothing_else() -> None:
    model = timm.create_model('test_resnet').train()
    copy = isolated(model)
    assert not any(module.training for module in copy.modules())
    pairs = list(zip(model.parameters(), copy.parameters()))
    assert pairs and all(one is not other and one.data_ptr() == other.data_ptr() for one, other in pairs)
    copy.half()
    assert next(model.parameters()).dtype == torch.float32


def test_wrapped_model_is_refused() -> None:
    with pytest.raises(ModelError, match='DataParallel'):
        isolated(torch.nn.DataParallel(timm.create_model('test_resnet')))
