"""Copies of models, in memory and in files."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

import sem_timm
from tests.compatibility.cells import capability
from tests.compatibility.twins import Twins, gradients
from tests.outputs import outputs
from tests.twins import assert_equal


@capability('`copy.deepcopy`')
def test_deepcopy(twins: Twins) -> None:
    check_copy(twins, copy.deepcopy)


@capability('`pickle`')
def test_pickle(twins: Twins) -> None:
    check_copy(twins, lambda model: pickle.loads(pickle.dumps(model)))


@capability('`torch.save` of the whole model')
def test_torch_save(twins: Twins, tmp_path: Path) -> None:
    def use(model: nn.Module) -> nn.Module:
        torch.save(model, tmp_path / 'model.pt')
        return torch.load(tmp_path / 'model.pt', weights_only=False)

    check_copy(twins, use)


@capability('`state_dict` and `load_state_dict`')
def test_state_dict(twins: Twins) -> None:
    def use(model: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        other = twins.patch(twins.column.create()) if sem_timm.patched_modules(model) else twins.column.create()
        other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        return other

    check_copy(twins, use)


def check_copy(twins: Twins, use: Any) -> None:
    """A copy computes what the model does, is independent of it, and can be undone alone."""
    images, model = twins.images(), twins.moved()
    expected, learned = outputs(model, images), gradients(model, images)
    twin = use(model)
    assert sem_timm.patched_modules(twin) == sem_timm.patched_modules(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert_equal(outputs(twin, images), expected)
    assert_equal(gradients(twin, images), learned)
    sem_timm.unpatch_model(twin)
    assert_equal(outputs(twin, images), outputs(twins.base, images))
    assert_equal(outputs(model, images), expected)


@capability('`ModelEmaV3`')
def test_model_ema(twins: Twins) -> None:
    averages = []
    for model in (twins.base, twins.model):
        average = ModelEmaV3(model, decay=0.75)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        average.update(model)
        averages.append(average)
    base, patched = (average.module for average in averages)
    assert_equal({key: patched.state_dict()[key] for key in base.state_dict()}, base.state_dict())
    start = twins.patch(twins.column.create()).state_dict()
    for name, parameter in patched.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.75 * start[name] + 0.25 * (start[name] + 0.01))
    averages[1].set(twins.model)
    assert_equal(outputs(patched, twins.images()), outputs(twins.model, twins.images()))
    assert not sem_timm.patched_modules(sem_timm.unpatch_model(patched)) and sem_timm.patched_modules(twins.model)
