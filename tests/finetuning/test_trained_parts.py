"""What is trained beside the head, and what stays as it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sem_timm import OptionError
from sem_timm.errors import MissingPackageError
from sem_timm.finetuning import FinetuneOptions
from sem_timm.finetuning.freezing import Freezing
from sem_timm.finetuning.models import head_parameters, inserted_parameters, operate
from tests.finetuning.small_runs import column, run_small
from tests.lively import lively
from tests.thorough import first_of_each


def trained_names(name: str, train: str, operation: str = 'sem') -> tuple[nn.Module, set[str]]:
    told = FinetuneOptions(model=name, train=train, operation=operation)
    model = timm.create_model(name, num_classes=3)
    operate(model, told, (3, 64, 64))
    Freezing(model, told)
    return model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize('name', first_of_each(['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet']))
def test_parts_are_what_their_names_say(name: str) -> None:
    model, only_head = trained_names(name, 'head')
    assert only_head == {*head_parameters(model)}
    new = {*inserted_parameters(model)}
    assert trained_names(name, 'new')[1] == only_head | new
    norms, biases = (trained_names(name, part)[1] - only_head for part in ('norms', 'biases'))
    vectors = {n for n, p in model.named_parameters() if p.ndim == 1} - new - only_head
    assert norms and norms <= vectors and not any('gamma' in n for n in norms)
    assert biases == {n for n in vectors if n.endswith('bias')}
    modules = {n.rpartition('.')[0] for n in norms}
    others = {n.rpartition('.')[0] for n in (new | only_head)}
    assert modules == {n for n, m in model.named_modules() if hasattr(m, 'eps')} - others
    assert trained_names(name, 'new+norms')[1] == only_head | new | norms
    assert trained_names(name, 'norms+biases')[1] == only_head | norms | biases
    assert trained_names(name, 'all')[1] == {n for n, _ in model.named_parameters()}


def test_the_old_option_is_one_of_them() -> None:
    assert FinetuneOptions(freeze_base=True).trained_parts == FinetuneOptions(train='new').trained_parts == {'new'}
    assert FinetuneOptions().trained_parts == {'all'}


@pytest.mark.parametrize(
    ('given', 'part'),
    [
        ({'train': 'norm'}, "train='norm' is unknown. Close: norms"),
        ({'train': 'new+'}, "train='new+' is unknown"),
        ({'train': 'all+norms'}, "with 'all' there is nothing to add"),
        ({'train': 'norms+all'}, "with 'all' there is nothing to add"),
        ({'train': 'norms', 'freeze_base': True}, "is the same as train='new', which excludes train='norms'"),
        ({'train': 'norms', 'unfreeze_every': 1.0}, 'exclude each other'),
    ],
)
def test_what_is_none_of_them_is_refused(given: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError) as caught:
        FinetuneOptions(**given)
    assert part in str(caught.value)


@pytest.mark.parametrize('train', first_of_each(['new+norms', 'norms', 'biases', 'head', 'new']))
def test_what_is_not_trained_stays_and_so_do_statistics(train: str, images: Path, tmp_path: Path) -> None:
    network = lively(timm.create_model('test_resnet', num_classes=3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = run_small(images, tmp_path / 'run', network=network, train=train, lr=0.01, image_size=32)
    changed = {name for name, tensor in before.items() if not torch.equal(result.model.state_dict()[name], tensor)}
    assert changed and {'fc.weight', 'fc.bias'} <= changed
    assert not any('running' in name or 'num_batches' in name for name in changed)
    assert ('bn1.weight' in changed) is ('norms' in train) and 'conv1.weight' not in changed
    assert (result.folder / 'patch').exists() is (train == 'new' or train == 'head')


def test_adapters_need_their_package(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(MissingPackageError, match="train='lora' needs PEFT, which is not installed"):
        run_small(images, tmp_path / 'run', train='lora')


def test_accuracy_may_be_measured_at_the_end_alone(images: Path, tmp_path: Path) -> None:
    each = run_small(images, tmp_path / 'each', epochs=3)
    last = run_small(images, tmp_path / 'last', epochs=3, measure_every=5)
    assert [entry['epoch'] for entry in last.history] == [3] and len(each.history) == 3
    assert last.history[-1] == each.history[-1]
    assert column(tmp_path / 'last', 'loss') == column(tmp_path / 'each', 'loss')
