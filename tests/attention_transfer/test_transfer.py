"""What a transfer does to a model, and what it reports."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sem_timm
from sem_timm.attention_transfer import initialize_memories, match_layers
from sem_timm.attention_transfer.matching import training_parts
from sem_timm.attention_transfer.pair import make_pair
from sem_timm.surgery.rewrite import edit_of
from tests.attention_transfer.small_transformer import SIZE, batches, create, labelled, swapped
from tests.snapshot import snapshot
from tests.thorough import thorough
from tests.twins import assert_equal, inserted


def test_errors_fall_from_stage_to_stage() -> None:
    rates = {'base_learning_rate': 2e-3}  # of a toy, which has not learned much that could be lost
    result = sem_timm.transfer(swapped(), batches(), train='module', epochs=30, **rates)
    swap, start, end = (result[stage].mean_error for stage in ('swap', 'initialize', 'match'))
    assert swap is not None and start is not None and end is not None
    assert start < 0.95 * swap and end < 0.95 * start
    losses = result['match'].losses
    assert len(losses) == 30 * 4 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert (result['initialize'].images_seen, result['match'].images_seen) == (64, 30 * 64)


def test_new_parameters_alone_change_and_undo_gives_the_original_exactly() -> None:
    original, model = create(), swapped()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sem_timm.transfer(model, batches())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(inserted(model)) != set()
    sem_timm.unpatch_model(model)
    assert_equal(original(batches(1)[0]), model(batches(1)[0]))


@pytest.mark.parametrize(
    'train, expected',
    [
        ('projection', {'core.mk', 'core.mv', 'proj.weight', 'proj.bias'}),
        ('module', {'core.mk', 'core.mv', 'proj.weight', 'proj.bias', 'qkv.weight', 'qkv.bias'}),
    ],
)
def test_weights_of_the_base_are_trained_on_request(train: str, expected: set[str]) -> None:
    model = swapped()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sem_timm.transfer(model, batches(), train=train)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f'blocks.{block}.attn.{name}' for block in (0, 1) for name in expected}


def test_nothing_else_of_the_model_and_the_process_changes() -> None:
    model = swapped().train()
    model.blocks[0].eval()
    model.blocks[1].mlp.requires_grad_(False)
    model.register_forward_hook(lambda *_: pytest.fail('the live model was run'))
    before = snapshot(model)
    loader = DataLoader(TensorDataset(torch.cat(batches())), 16, shuffle=True)
    sem_timm.transfer(model, loader, stages=('initialize', 'match', 'distill'))
    after = snapshot(model)
    different = {name for name in before if not _same(before[name], after[name])}
    assert list(before) == list(after)
    assert different == {f'blocks.{block}.attn.core.{memory}' for block in (0, 1) for memory in ('mk', 'mv')}


def _same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return all(map(_same, first, second))
    return first == second


def test_the_same_seed_gives_the_same_memories() -> None:
    models = [swapped(), swapped()]
    for skip, model in enumerate(models):
        torch.rand(skip)
        loader = DataLoader(TensorDataset(torch.cat(batches())), 16, shuffle=True)
        sem_timm.transfer(model, loader)
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_student_and_teacher_share_all_weights_that_are_not_trained() -> None:
    model = swapped()
    pair = make_pair(model, batches(1)[0], ['new'])
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert {p.data_ptr() for p in pair.teacher.parameters()} <= addresses
    own = {name for name, p in pair.student.named_parameters() if p.data_ptr() not in addresses}
    assert own == set(inserted(model)) == set(pair.trained)
    images = batches(1)[0]
    assert_equal(create()(images), pair.teacher(images))
    assert_equal(model(images), pair.student(images))
    assert not any(edit_of(module) or '_surgery_notes' in vars(module) for module in pair.teacher.modules())


def test_accuracies_of_all_stages_are_reported() -> None:
    model = swapped()
    result = sem_timm.transfer(
        model, batches(), stages=('initialize', 'match', 'distill'), evaluation=labelled(create()), distill_epochs=2
    )
    assert result['original'].accuracy == 100  # it named the classes itself
    assert [stage.name for stage in result.stages] == ['original', 'swap', 'initialize', 'match', 'distill']
    assert all(stage.accuracy is not None for stage in result.stages)
    assert result.won_back('original') == 1 and result.won_back('swap') == 0
    pairs = labelled(create())
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    assert result['distill'].accuracy == pytest.approx(100 * right / 32)
    assert result['distill'].images_seen == 128


def test_the_result_prints_as_a_table_and_is_data() -> None:
    result = sem_timm.transfer(swapped(), batches(), evaluation=labelled(create()))
    lines = repr(result).splitlines()
    assert lines[0].split() == ['relative', 'error', 'original', 'swap', 'initialize', 'match']
    assert [line.split()[0] for line in lines[2:7]] == ['blocks.0.attn', 'blocks.1.attn', 'mean', 'accuracy', 'won']
    assert lines[-1] == 'external on VisionTransformer: 1,024 parameters trained.'
    data = json.loads(json.dumps(result.to_dict()))
    assert data['operation'] == 'external' and data['trained'] == 1024
    assert [stage['name'] for stage in data['stages']] == ['original', 'swap', 'initialize', 'match']
    assert set(data['stages'][1]['errors']) == {'blocks.0.attn', 'blocks.1.attn'}


def test_without_labels_there_are_errors_and_no_accuracy() -> None:
    result = sem_timm.transfer(swapped(), batches(), evaluation=batches(1))
    assert [stage.accuracy for stage in result.stages] == [None] * 4
    assert result.won_back('match') is None
    assert 'accuracy' not in repr(result)


def test_images_alone_need_no_second_pass() -> None:
    result = sem_timm.transfer(swapped(), batches(), evaluation=iter(batches(1)))
    assert result['match'].mean_error and result['match'].accuracy is None


@pytest.mark.parametrize('form', [list, tuple, numpy.array])
def test_labels_need_not_be_tensors(form: Any) -> None:
    pairs = labelled(create())
    others = [(images, form(labels.tolist())) for images, labels in pairs]
    first, second = (sem_timm.transfer(swapped(), batches(), evaluation=loader) for loader in (pairs, others))
    assert second['original'].accuracy == 100
    assert [stage.accuracy for stage in first.stages] == [stage.accuracy for stage in second.stages]


def test_labels_of_the_loader_are_not_read() -> None:
    loader = [(images, {'boxes': 1}) for images in batches()]
    assert len(sem_timm.transfer(swapped(), loader).stages) == 4


@pytest.mark.parametrize(
    'schedule, expected',
    [
        ('constant', [1, 1, 1, 1]),
        ('step', [1, 1, 0.1, 0.01]),
        ('multistep', [1, 1, 0.1, 0.01]),
    ],
)
@pytest.mark.parametrize('steps', [4, 400])
def test_schedules_that_go_by_steps_fall_in_proportion(schedule: str, expected: list[float], steps: int) -> None:
    options = sem_timm.TransferOptions(scheduler=schedule, warmup=0)
    optimizer, scheduler = training_parts([([torch.nn.Parameter(torch.zeros(1))], 1.0)], options, steps)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(step + 1)
    assert rates[:: steps // 4] == pytest.approx(expected)


@pytest.mark.parametrize('name', ['AdamW', 'lookahead_adamw'])
def test_optimizers_are_named_as_timm_reads_them(name: str) -> None:
    assert len(sem_timm.transfer(swapped(), batches(), optimizer=name)['match'].losses) == 4


@pytest.mark.parametrize('kind', ['pairs', 'dictionaries'])
def test_loaders_may_yield_labels_beside_the_images(kind: str) -> None:
    models = [swapped(), swapped()]
    labels = torch.zeros(16, dtype=torch.long)
    others = [(x, labels) if kind == 'pairs' else {'image': x, 'label': labels} for x in batches()]
    for model, loader in zip(models, (batches(), others)):
        sem_timm.transfer(model, loader)
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_stages_alone_are_the_stages_of_a_transfer() -> None:
    whole, parts = swapped(), swapped()
    sem_timm.transfer(whole, batches())
    initialize_memories(parts, iter(batches()))
    match_layers(parts, batches())
    assert_equal(whole.state_dict(), parts.state_dict())


def test_distillation_brings_the_probabilities_closer() -> None:
    model, images = swapped(), torch.cat(batches())
    wanted = create()(images).softmax(-1)

    def distance() -> float:
        return float((model(images).softmax(-1) - wanted).abs().mean())

    with torch.no_grad():
        before = distance()
        rates = {'distill_learning_rate': 1e-3}  # of a toy, which has not learned much that could be lost
        sem_timm.transfer(model, batches(), stages=('distill',), distill_train='all', distill_epochs=20, **rates)
        assert distance() < 0.8 * before


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[str, int, int]] = []
    sem_timm.transfer(
        swapped(),
        batches(),
        stages=('match', 'distill'),
        steps=3,
        progress=lambda stage, step, steps, loss: told.append((stage, step, steps)),
    )
    assert told == [('match', 1, 3), ('match', 2, 3), ('match', 3, 3)] + [('distill', s, 4) for s in (1, 2, 3, 4)]


def test_other_patches_of_the_model_stay_in_student_and_teacher() -> None:
    model = swapped(model=sem_timm.patch_model(create(), 'sem', target='blocks.1', input_size=SIZE))
    copied = copy.deepcopy(model)
    sem_timm.transfer(model, batches())
    sem = {name: p for name, p in model.named_parameters() if '.sem.' in name}
    assert sem and all(torch.equal(p, copied.get_parameter(name)) for name, p in sem.items())
    assert any('sem' in module.inserted for module in sem_timm.patched_modules(model))


def test_unread_parameters_of_a_transferred_model_can_be_dropped() -> None:
    model, images = swapped(), batches(1)[0]
    sem_timm.transfer(model, batches())
    expected = model(images)
    assert_equal(expected, sem_timm.drop_unread_parameters(model)(images))


@thorough
def test_importing_the_package_does_not_import_the_room() -> None:
    code = 'import sys, sem_timm; print("sem_timm.attention_transfer" in sys.modules, "transfer" in dir(sem_timm))'
    printed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.split() == ['False', 'True']


@pytest.mark.parametrize(
    ('alone', 'expected'), [(1.0, {'blocks'}), (0.5, {'blocks', 'patch_embed', 'norm', 'cls_token'})]
)
def test_final_features_are_matched_by_the_swapped_modules_and_then_by_all(alone: float, expected: set[str]) -> None:
    model = swapped()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = {'stages': ('initialize', 'features'), 'features_epochs': 20, 'features_learning_rate': 1e-3}
    result = sem_timm.transfer(model, batches(), features_alone=alone, **options)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert expected <= {name.partition('.')[0] for name in changed}
    assert (alone == 1) == all('.attn.' in name for name in changed)
    losses = result['features'].losses
    assert len(losses) == 80 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_maps_of_values_are_fitted_in_closed_form() -> None:
    # In the original attention is the mean of the values where queries are zero: a map of the mean says all.
    original = create()
    with torch.no_grad():
        for block in original.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight[:32] = 0  # type: ignore[index]
            block.attn.qkv.bias[:32] = 0  # type: ignore[index]
    for inputs in ('swapped', 'original'):
        model = swapped('external', model=copy.deepcopy(original), own=True)
        result = sem_timm.transfer(model, batches(), stages=('initialize',), inputs=inputs)
        assert result['initialize'].mean_error < 0.05 < result['swap'].mean_error  # type: ignore[operator]
