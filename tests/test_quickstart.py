"""The quickstart: what it claims, on its real weights and images, with short trainings."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import sem_timm
from tests.thorough import first_of_each

QUICKSTART = Path(__file__).parents[1] / 'examples' / 'quickstart.py'
SEEN = {'chelsea': 'cat', 'coffee': 'espresso', 'rocket': 'missile', 'china': 'palace', 'flower': 'daisy'}


@pytest.fixture(scope='module')
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location('quickstart', QUICKSTART)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['quickstart'] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def network(quickstart: ModuleType) -> nn.Module:
    return quickstart.load_imagenet_network()


def test_network_names_the_photographs(quickstart: ModuleType, network: nn.Module) -> None:
    photographs = quickstart.load_photographs()
    logits = quickstart.logits_of(network, quickstart.photograph_inputs(network, photographs))
    guesses = quickstart.most_probable(logits)
    assert list(photographs) == list(SEEN)
    for (class_name, probability), expected in zip(guesses, SEEN.values()):
        assert expected in class_name
        assert 0.1 < probability <= 1


def test_patch_keeps_the_logits_of_photographs_and_undo_keeps_them_too(
    quickstart: ModuleType, network: nn.Module
) -> None:
    inputs = quickstart.photograph_inputs(network, quickstart.load_photographs())
    original = quickstart.logits_of(network, inputs)
    sem_timm.patch_model(network)
    assert torch.equal(quickstart.logits_of(network, inputs), original)
    assert not quickstart.is_plain(network)
    sem_timm.unpatch_model(network)
    assert torch.equal(quickstart.logits_of(network, inputs), original)
    assert quickstart.is_plain(network)


def test_weights_of_another_shape_are_refused(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, 'ARCHITECTURE', 'tf_efficientnet_lite1')
    with pytest.raises(ValueError, match='do not have the shapes of tf_efficientnet_lite1'):
        quickstart.load_imagenet_network()


def test_digits_are_split_without_overlap_and_normalised(quickstart: ModuleType, network: nn.Module) -> None:
    digits = quickstart.load_digit_images(network, image_size=16)
    images = torch.cat((digits.train_images, digits.test_images))
    labels = torch.cat((digits.train_labels, digits.test_labels))
    assert images.shape == (1797, 3, 16, 16)
    assert labels.unique().tolist() == list(range(10))
    # No two of scikit-learn's digits are the same image, so each that occurs twice would be in both halves.
    assert len({image.numpy().tobytes() for image in images}) == 1797
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1


@pytest.mark.parametrize(('num_steps', 'test_images'), first_of_each([(16, 128), (16, None)]))
def test_whole_run_holds_each_statement(
    num_steps: int,
    test_images: int | None,
    quickstart: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = quickstart.load_digit_images

    def fewer(*args: Any) -> Any:
        digits = load(*args)
        images, labels = digits.test_images[:test_images], digits.test_labels[:test_images]
        return dataclasses.replace(digits, test_images=images, test_labels=labels)

    monkeypatch.setattr(quickstart, 'load_digit_images', fewer)
    small = {'model': 'test_resnet', 'max_train_images': 40, 'batch_size': 10, 'epochs': 1, 'progress': False}
    assert quickstart.main(num_steps=num_steps, image_size=32, compared={**quickstart.COMPARED, **small, 'seeds': 2})
    printed = capsys.readouterr().out
    assert 'blocks.6.0' in printed and '16 sites' in printed
    assert 'sem (new)' in printed and 'none (norms)' in printed and 'all rows have 2 runs' in printed
    assert '8 of 8 statements hold' in printed
    assert 'NO ' not in printed
