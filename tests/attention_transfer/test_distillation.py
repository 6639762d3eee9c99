"""What a distillation aims at, and the error of the layers beside it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sem_timm
from sem_timm import ModelError, OptionError
from sem_timm.attention_transfer import distillation
from sem_timm.attention_transfer.matching import training_parts
from sem_timm.attention_transfer.measure import spreads
from sem_timm.attention_transfer.pair import make_pair
from tests.attention_transfer.small_transformer import batches, create, labelled, swapped
from tests.refusals import refused

# One step of plain gradient descent at a rate of one, so that what a parameter moved by is its gradient.
ONE_STEP = {
    'stages': ('distill',),
    'optimizer': 'momentum',
    'weight_decay': 0.0,
    'distill_learning_rate': 1.0,
    'distill_steps': 1,
    'warmup': 0.0,
}

# Of a toy, which has not learned much that could be lost.
RATES = ('distill_learning_rate', 'base_learning_rate')


def one_step(images: list[Any], **options: Any) -> tuple[dict[str, Tensor], float]:
    """What each trained parameter moved by, and the loss."""
    model = swapped()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = sem_timm.transfer(model, images, calibration_images=1, **{**ONE_STEP, **options})
    moved = {
        name: before[name] - p.detach() for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    return moved, result['distill'].losses[0]


def divergence(student: Any, teacher: Any, images: Tensor) -> Tensor:
    """That of softened probabilities at the default temperature of 2."""
    with torch.no_grad():
        wanted = (teacher(images) / 2).log_softmax(-1)
    return 4 * F.kl_div((student(images) / 2).log_softmax(-1), wanted, reduction='batchmean', log_target=True)


def own_forward_error(model: Any, images: Tensor) -> Tensor:
    """The mean error of the layers, each in the forward of its own model, by plain hooks."""
    original, student = create(), model
    given: list[list[Tensor]] = [[], []]
    for one, found in zip((student, original), given):
        for block in one.blocks:
            block.attn.register_forward_hook(lambda _, args, output, found=found: found.append(output))
    student(images)
    with torch.no_grad():
        original(images)
    errors = []
    for one, other in zip(*given):
        for tokens in (slice(0, 1), slice(1, None)):
            wanted = other[:, tokens]
            variance = wanted.flatten(0, 1).var(0, correction=0).mean()
            errors.append((one[:, tokens] - wanted).square().mean() / variance)
    return torch.stack(errors).mean()


@pytest.mark.parametrize('aim', ['logits', 'labels'])
@pytest.mark.parametrize('weight', [0.0, 50.0])
def test_the_error_of_the_layers_is_in_loss_and_gradient(aim: str, weight: float) -> None:
    images = batches(1)[0]
    labels = torch.arange(16) % 4
    moved, loss = one_step([(images, labels)], distill_with=aim, distill_layer_weight=weight)
    model = swapped()
    expected = F.cross_entropy(model(images), labels) if aim == 'labels' else divergence(model, create(), images)
    expected = expected + weight * own_forward_error(model, images) if weight else expected
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert {*moved} == {f'blocks.{block}.attn.core.{memory}' for block in (0, 1) for memory in ('mk', 'mv')}
    for name, gradient in moved.items():
        wanted = model.get_parameter(name).grad
        # Parameters of about one are subtracted to get what they moved by.
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6 + 1e-4 * float(wanted.abs().max()))


def test_layers_stay_closer_to_the_original_with_it() -> None:
    errors, begun = [], swapped()
    sem_timm.transfer(begun, batches(), stages=('initialize',))
    for weight in (0.0, 50.0):
        model = copy.deepcopy(begun)
        options = {'distill_train': 'all', 'distill_epochs': 20, **dict.fromkeys(RATES, 2e-3)}
        sem_timm.transfer(model, batches(), stages=('distill',), distill_layer_weight=weight, **options)
        with torch.no_grad():
            errors.append(own_forward_error(model, torch.cat(batches())).item())
    assert errors[1] < 0.8 * errors[0]


def test_the_error_counts_class_token_and_patches_as_one_half_each() -> None:
    model, images = swapped(), batches(1)[0]
    pair = make_pair(model, images, ['new'])
    kinds = spreads(pair, [images])['blocks.0.attn']
    assert len(kinds) == 2 and kinds[0].count == 16 and kinds[1].count == 16 * 16


def test_labels_teach_what_the_original_does_not_know() -> None:
    pairs = [(images, (classes + 1) % 4) for images, classes in labelled(create(), 4)]
    model = swapped()
    options: dict[str, Any] = {
        'distill_with': 'labels',
        'distill_train': 'all',
        'distill_epochs': 40,
        'distill_layer_weight': 0.0,
    }
    options.update(dict.fromkeys(RATES, 1e-3))
    result = sem_timm.transfer(model, pairs, stages=('distill',), evaluation=pairs, **options)
    assert result['original'].accuracy == 0
    assert result['distill'].accuracy > 60  # type: ignore[operator]


def test_labels_need_no_task_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'timm.task', None)  # as before timm 1.0.23
    sem_timm.transfer(swapped(), labelled(create()), stages=('distill',), distill_with='labels')


@pytest.mark.parametrize(('rate', 'expected'), [(1e-3, [1e-3, 1e-4]), (1e-5, [1e-5, 1e-5])])
def test_weights_of_the_base_learn_at_the_lower_rate(
    rate: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def parts(groups: Any, *others: Any) -> Any:
        given.extend(peak for _, peak in groups)
        return training_parts(groups, *others)

    monkeypatch.setattr(distillation, 'training_parts', parts)
    options = {'distill_train': 'module', 'distill_steps': 1, 'distill_learning_rate': rate}
    sem_timm.transfer(swapped(), batches(1), stages=('distill',), **options)
    assert given == expected


@pytest.mark.parametrize(
    'labels, parts',
    [
        (None, ['images alone', 'pairs of images and labels', "distill_with='logits'"]),
        (torch.zeros(16), ['torch.float32', 'whole numbers (B,)', "distill_with='logits'"]),
        (torch.full((16,), -1), ['a label of -1', 'counted from 0']),
        (torch.full((16,), 4), ['go up to 4', '(16, 4)', "distill_with='logits'"]),
    ],
)
def test_labels_that_cannot_be_aimed_at(labels: Any, parts: list[str]) -> None:
    model = swapped()
    with refused(model, OptionError, *parts):
        sem_timm.transfer(model, [(batches(1)[0], labels)], stages=('distill',), distill_with='labels')


def test_labels_that_end_half_way() -> None:
    model = swapped()
    with refused(model, OptionError, 'images alone'):
        loader = [*labelled(create()), (batches(1)[0], None)]
        sem_timm.transfer(model, loader, stages=('distill',), distill_with='labels', calibration_images=17)


def test_a_model_without_classes_has_no_labels() -> None:
    original: Any = create()
    original.reset_classifier(0)
    model = swapped(model=original)
    with refused(model, ModelError, 'names classes', 'with a head'):
        sem_timm.transfer(model, labelled(create()), stages=('distill',), distill_with='labels')


@pytest.mark.parametrize(
    'options, parts',
    [
        ({'distill_with': 'logit'}, ["distill_with='logit' is unknown", 'logits']),
        ({'distill_with': None}, ['distill_with=None is unknown']),
        ({'distill_layer_weight': -1.0}, ['distill_layer_weight=-1.0', 'at least 0']),
        ({'distill_layer_weight': True}, ['distill_layer_weight=True']),
        ({'distill_layer_weight': float('inf')}, ['distill_layer_weight=inf']),
    ],
)
def test_options_of_the_aim_without_a_meaning(options: dict[str, Any], parts: list[str]) -> None:
    model = swapped()
    with refused(model, OptionError, *parts):
        sem_timm.transfer(model, batches(), stages=('distill',), **options)


@pytest.mark.parametrize('weight', [0.0, 50.0])
def test_images_that_are_no_numbers_name_the_stage_and_the_layer(weight: float) -> None:
    model = swapped()
    images = [batch * float('nan') for batch in batches()]
    with refused(model, ModelError, "'distill'", 'blocks.0.attn', 'look at the images'):
        sem_timm.transfer(model, images, stages=('distill',), distill_layer_weight=weight)


def test_one_that_goes_on_is_one_with_the_same_aim(tmp_path: Path) -> None:
    file, pairs = tmp_path / 'transfer.pt', labelled(create())
    options = {'stages': ('initialize', 'distill'), 'distill_with': 'labels', 'distill_layer_weight': 1.0}
    model = swapped()
    first = sem_timm.transfer(model, pairs, checkpoint=file, **options)
    again = sem_timm.transfer(swapped(), pairs, checkpoint=file, **options)
    assert again['distill'].losses == first['distill'].losses
    for other in ({'distill_with': 'logits'}, {'distill_layer_weight': 2.0}):
        name = next(iter(other))
        with refused(model, OptionError, 'of another transfer', f'{name}={options[name]!r} there'):
            sem_timm.transfer(model, pairs, checkpoint=file, **{**options, **other})
