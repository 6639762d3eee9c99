"""Which parameters are trained, how fast and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sem_timm
from sem_timm.errors import OptionError, SemTimmError
from sem_timm.finetuning import FinetuneOptions
from sem_timm.finetuning.freezing import Freezing
from sem_timm.finetuning.groups import parameter_groups
from sem_timm.finetuning.models import head_parameters, inserted_parameters
from sem_timm.finetuning.parts import build_parts, create_accelerator
from tests.finetuning.small_runs import run_small
from tests.lively import lively


def patched_model(name: str = 'test_resnet', operation: str = 'sem', **given: Any) -> nn.Module:
    return sem_timm.patch_model(lively(timm.create_model(name, num_classes=3)), operation, **given)


def test_new_modules_have_their_own_learning_rate_within_each_layer() -> None:
    model = patched_model()
    groups = parameter_groups(model, FinetuneOptions(new_lr_scale=10.0, layer_decay=0.5))
    plain = parameter_groups(timm.create_model('test_resnet', num_classes=3), FinetuneOptions(layer_decay=0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    decays = {names[id(p)]: group['weight_decay'] for group in groups for p in group['params']}
    assert set(scales) == set(names.values()) and sum(len(g['params']) for g in groups) == len(scales)
    for name in inserted_parameters(model):
        block = name.split('.sem.')[0]
        assert scales[name] == pytest.approx(10 * scales[f'{block}.conv1.weight']), name
        assert (decays[name] == 0) == (model.get_parameter(name).ndim <= 1), name
    assert scales['fc.weight'] == 1.0
    base = [group for group in groups if group['name'].startswith('base')]
    assert [(g['lr_scale'], g['weight_decay'], len(g['params'])) for g in base] == [
        (g['lr_scale'], g['weight_decay'], len(g['params'])) for g in plain
    ]


@pytest.mark.filterwarnings('ignore::sem_timm.SwapWarning')
def test_parameters_that_nothing_reads_are_in_no_group() -> None:
    model = patched_model('test_vit', 'eamlp', target=r'blocks\.0\.attn')
    unread = [name for name, p in model.named_parameters() if not p.requires_grad]
    grouped = {id(p) for group in parameter_groups(model, FinetuneOptions()) for p in group['params']}
    assert unread and not any(id(model.get_parameter(name)) in grouped for name in unread)


def test_names_of_timm_without_weight_decay_have_none() -> None:
    model = patched_model('test_vit')
    groups = parameter_groups(model, FinetuneOptions())
    decays = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert decays[id(model.pos_embed)] == 0 and decays[id(model.blocks[0].mlp.fc1.weight)] > 0


def test_frozen_base_keeps_its_weights_and_statistics(images: Path, tmp_path: Path) -> None:
    network = patched_model(input_size=(3, 32, 32))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained = {*inserted_parameters(network), *head_parameters(network)}
    result = run_small(images, tmp_path / 'run', freeze_base=True, image_size=32, lr=0.01, network=network)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert result.num_trained_parameters == sum(network.get_parameter(name).numel() for name in trained)
    assert changed <= trained
    assert {'fc.weight', 'fc.bias'} <= changed
    # Weight decay leaves biases alone: what changes them are gradients.
    assert {f'{part.name}.sem.operators.ie.beta' for part in sem_timm.patched_modules(network)} <= changed


def test_stages_are_freed_from_the_last_to_the_first() -> None:
    model = patched_model()
    freezing = Freezing(model, FinetuneOptions(unfreeze_every=2.0))
    freezing.start()

    def trained() -> set[str]:
        freezing.set_training_mode(model)
        norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
        frozen = {n.rpartition('.')[0] for n, p in model.named_parameters() if not p.requires_grad}
        assert not norms & frozen
        return {n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad and '.sem.' not in n}

    assert trained() == {'fc'}
    assert not freezing.advance(1.9)
    assert freezing.advance(2.0) and trained() == {'fc', 'layer4'}
    assert freezing.advance(6.5) and trained() == {'fc', 'layer4', 'layer3', 'layer2'}
    assert freezing.advance(99.0)
    assert all(p.requires_grad for p in model.parameters()) and not freezing.advance(100.0)


@pytest.mark.parametrize('frozen', [{'freeze_base': True}, {'unfreeze_every': 1.0}], ids=str)
@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_synchronised_norms_of_what_is_frozen_stay_in_evaluation_mode(name: str, frozen: dict[str, Any]) -> None:
    told = FinetuneOptions(model=name, cpu=True, epochs=1, **frozen)
    accelerator = create_accelerator(told)
    parts = build_parts(replace(told, sync_bn=True), accelerator)  # as where there are GPUs
    parts.freezing.set_training_mode(parts.model)
    norms = [module for module in parts.model.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert not any(norm.training for norm in norms)
    # Some of timm's norms have an activation in them.
    plain, image = build_parts(told, accelerator).model, torch.randn(2, 3, 32, 32)
    first, second = (lively(model, torch.Generator().manual_seed(1)) for model in (parts.model, plain))
    assert torch.equal(first.eval()(image), second.eval()(image))


def test_frozen_model_without_head_and_new_modules_is_refused() -> None:
    model = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(OptionError, match='nothing is left to train'):
        Freezing(model, FinetuneOptions(freeze_base=True, operation='none'))


class Own(nn.Module):
    """A network that is none of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model('test_resnet', num_classes=0)
        self.top = nn.Linear(self.body.num_features, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.body(images))


class OwnWithHead(Own):
    def get_classifier(self) -> nn.Module:
        return self.top


def test_own_model_with_a_frozen_base_says_which_module_is_its_head(images: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {'freeze_base': True, 'image_size': 32, 'lr': 0.01}
    with pytest.raises(OptionError, match=r'Own does not say .* Give it a method get_classifier\(\)'):
        run_small(images, tmp_path / 'run', network=Own(), **given)
    network = OwnWithHead()
    before = network.top.weight.clone()
    result = run_small(images, tmp_path / 'run', network=network, **given)
    assert not torch.equal(network.top.weight, before)
    sem_timm.load_patch(OwnWithHead(), result.folder / 'patch', input_size=(3, 32, 32), check_base='ignore')


def test_run_whose_operation_no_file_can_name_has_no_patch(images: Path, tmp_path: Path) -> None:
    network = patched_model('test_resnet', operation=lambda channels: nn.BatchNorm2d(channels))
    with pytest.warns(UserWarning, match='patch was not written: .* is made with code of its own'):
        result = run_small(images, tmp_path / 'run', network=network, freeze_base=True)
    assert (result.folder / 'result.json').is_file() and not (result.folder / 'patch').exists()


@pytest.mark.parametrize('wrong', ['folder', 'optimizer', 'schedule', 'operation_options'])
def test_own_model_is_given_back_when_a_run_cannot_begin(wrong: str, images: Path, tmp_path: Path) -> None:
    network = timm.create_model('test_resnet', num_classes=3)
    network.conv1.requires_grad_(False)
    before = {name: (p.requires_grad, p.tolist()) for name, p in network.named_parameters()}
    attributes = dict(vars(network))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'folder').touch() if wrong == 'folder' else None
    values = {'folder': {}, 'operation_options': {wrong: {'reduction': 0}}}.get(wrong, {wrong: 'wrong'})
    given: dict[str, Any] = {'freeze_base': True, 'precision': 'bf16', 'compile': True, 'head_scale': 0.5, **values}
    with pytest.raises(SemTimmError):
        run_small(images, tmp_path / 'run', network=network, **given)
    assert not sem_timm.patched_modules(network) and vars(network) == attributes
    assert {name: (p.requires_grad, p.tolist()) for name, p in network.named_parameters()} == before


def test_own_model_is_trained_and_patched(images: Path, tmp_path: Path) -> None:
    network = timm.create_model('test_resnet', num_classes=3)
    result = run_small(images, tmp_path / 'run', network=network, operation='eca', target=['layer4.0'])
    assert result.model is network
    assert [module.name for module in sem_timm.patched_modules(network)] == ['layer4.0']
