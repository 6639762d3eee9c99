"""A patch goes onto the network it was made for, whatever that is wrapped in; and onto no other one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import OptionError, PatchFileError
from tests.families import FAMILIES
from tests.lively import lively
from tests.persistence.patches import base, outputs, patch
from tests.refusals import refused
from tests.thorough import first_of_each
from tests.twins import inserted
from tests.versions import CONVNEXT_STAGES

# A family and how timm makes a feature backbone of it: names as they are, flattened, or behind model. and body.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ('resnet', {'feature_cls': 'list'}),
    ('convnext', {'feature_cls': 'list'}),
    ('convnext', {'feature_cls': 'hook'}),
    ('efficientnet', {}),
    ('vit_registers', {'feature_cls': 'getter'}),
    ('resnet', {'feature_cls': 'dict'}),
    ('resnet', {'feature_cls': 'hook'}),
    ('convnext', {'feature_cls': 'getter'}),
    ('efficientnet', {'feature_cls': 'hook'}),
    ('vit_registers', {'feature_cls': 'hook'}),
    ('swin', {'feature_cls': 'list'}),
]
LAST = {
    'resnet': 'layer4.0',
    'convnext': 'stages.3.blocks.1',
    'efficientnet': 'blocks.4.0',
    'vit_registers': 'blocks.5',
    'swin': 'layers.3.blocks.1',
}
each_form = pytest.mark.parametrize('name, form', first_of_each(FORMS, lambda name, form: name))


def spelt(name: str) -> str:
    return name.removeprefix('model.').removeprefix('body.').replace('_', '.')


def backbone(name: str, weights: nn.Module, **form: Any) -> Any:
    """A feature backbone with the weights of a whole model."""
    model = FAMILIES[name].create(features_only=True, **form)
    given = {spelt(key): value for key, value in weights.state_dict().items()}
    model.load_state_dict({key: given[spelt(key)] for key in model.state_dict()})
    return model


def last_features(model: Any, name: str) -> Tensor:
    """What the last block returns, whichever form a wrapper gives its features."""
    wanted, seen = LAST[name], []
    (block,) = [module for path, module in model.named_modules() if spelt(path) == wanted]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model.eval()(FAMILIES[name].images())
    handle.remove()
    (features,) = seen
    return features


@each_form
def test_gates_of_a_classifier_work_in_its_backbone(tmp_path: Path, name: str, form: dict[str, Any]) -> None:
    whole = base(name)
    model = backbone(name, whole, **form)
    patch(whole, ('sem', {}), input_size=FAMILIES[name].input_size)
    sem_timm.save_patch(whole, tmp_path)
    before = last_features(model, name)
    sem_timm.load_patch(model, tmp_path, check_base='error', input_size=FAMILIES[name].input_size)
    assert len(inserted(model)) == len(inserted(whole))
    assert torch.equal(last_features(model, name), last_features(whole, name))
    assert not torch.equal(last_features(model, name), before)
    sem_timm.unpatch_model(model)
    assert torch.equal(last_features(model, name), before)


@each_form
def test_gates_of_a_backbone_work_in_the_classifier(tmp_path: Path, name: str, form: dict[str, Any]) -> None:
    whole = base(name)
    plain = backbone(name, whole, **form)
    sizes = FAMILIES[name].input_size
    # In a backbone blocks are found without the help of the family; these are blocks in both.
    blocks = {spelt(site.name) for site in sem_timm.plan_model(whole, input_size=sizes)}
    patch(plain, ('sem', {'target': lambda path, module: spelt(path) in blocks}), input_size=sizes)
    sem_timm.save_patch(plain, tmp_path)
    sem_timm.load_patch(whole, tmp_path, check_base='error', input_size=sizes)
    assert torch.equal(last_features(whole, name), last_features(plain, name))


def test_swapped_attention_goes_onto_a_backbone_too(tmp_path: Path) -> None:
    whole = base('vit_registers')
    model = backbone('vit_registers', whole)
    sem_timm.save_patch(patch(whole, ('external', {'memory': 8})), tmp_path)
    sem_timm.load_patch(model, tmp_path, check_base='error')
    assert torch.equal(last_features(model, 'vit_registers'), last_features(whole, 'vit_registers'))


def test_patch_of_a_model_goes_onto_its_variant_as_a_backbone(tmp_path: Path) -> None:
    whole = patch(base())
    sem_timm.save_patch(whole, tmp_path)
    model: Any = timm.create_model('test_resnet_sem', features_only=True)
    model.load_state_dict(whole.state_dict(), strict=False)
    for parameter in inserted(model).values():
        nn.init.zeros_(parameter)
    sem_timm.load_patch(model, tmp_path, check_base='error')
    assert torch.equal(last_features(model, 'resnet'), last_features(whole, 'resnet'))


class Segmenter(nn.Module):
    """An encoder deep inside, and a decoder that is none of the network's business."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model = model
        self.decoder = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.encoder.model(self.decoder(x))


class Siamese(nn.Module):
    """Two networks of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = base(), base()

    def forward(self, x: Tensor) -> Any:
        return self.left(x) + self.right(x)


def test_a_network_inside_of_a_larger_model_is_found(tmp_path: Path) -> None:
    whole = base()
    found, named = (Segmenter(backbone('resnet', whole)) for _ in range(2))
    sem_timm.save_patch(patch(whole), tmp_path)
    sem_timm.load_patch(found, tmp_path, check_base='error')
    sem_timm.load_patch(named, tmp_path, check_base='error', prefix='encoder.model.')
    for model in (found, named):
        assert torch.equal(last_features(model.encoder.model, 'resnet'), last_features(whole, 'resnet'))
        assert next(part.name for part in sem_timm.patched_modules(model)) == 'encoder.model.layer1.0'


def test_of_two_networks_one_is_named(tmp_path: Path) -> None:
    whole = patch(base())
    sem_timm.save_patch(whole, tmp_path)
    model = Siamese()
    with refused(model, PatchFileError, '2 parts of this Siamese', "'left', 'right'", "prefix='left'"):
        sem_timm.load_patch(model, tmp_path)
    with refused(model, OptionError, "prefix='write' is no module of Siamese", 'right'):
        sem_timm.load_patch(model, tmp_path, prefix='write')
    sem_timm.load_patch(model, tmp_path, check_base='error', prefix='right')
    assert torch.equal(outputs(model.right), outputs(whole)) and not sem_timm.patched_modules(model.left)


def test_an_encoder_is_saved_out_of_its_model(tmp_path: Path) -> None:
    plain = base()
    model = Segmenter(copy.deepcopy(plain))
    patch(model.encoder.model)
    model.encoder.model.bn1.running_mean += 1
    options: dict[str, Any] = {'base': Segmenter(plain), 'include_changed_base': True}
    sem_timm.save_patch(nn.DataParallel(model), tmp_path / 'part', prefix='encoder.model', **options)
    sem_timm.load_patch(plain, tmp_path / 'part', check_base='error')
    assert torch.equal(outputs(plain), outputs(model.encoder.model))
    # A file of the larger model, in which the network is told by the names of its sites.
    sem_timm.save_patch(model, tmp_path / 'whole')
    other = copy.deepcopy(model.encoder.model)
    sem_timm.load_patch(sem_timm.unpatch_model(other), tmp_path / 'whole', check_base='error')
    assert torch.equal(outputs(other), outputs(model.encoder.model))
    with refused(model, OptionError, "prefix='encode' is no module of Segmenter", 'encoder'):
        sem_timm.save_patch(model, tmp_path / 'no', prefix='encode')


@pytest.mark.parametrize('name', ['resnet', 'convnext', 'vit_registers'])
def test_what_a_backbone_lacks_is_told_and_left_out_on_request(tmp_path: Path, name: str) -> None:
    whole = base(name)
    model = backbone(name, whole, out_indices=(0, 1))
    patch(whole, ('sem', {}))
    sem_timm.save_patch(whole, tmp_path, include_head=True)
    last = sem_timm.patched_modules(whole)[-1].name
    with refused(model, PatchFileError, 'lacks the end of the network', f'{last}, its classifier', "missing='skip'"):
        sem_timm.load_patch(model, tmp_path)
    with refused(model, OptionError, "missing='all' is unknown", "'error', 'skip'"):
        sem_timm.load_patch(model, tmp_path, missing='all')
    sem_timm.load_patch(model, tmp_path, check_base='error', missing='skip')
    images = FAMILIES[name].images()
    stages = CONVNEXT_STAGES if name == 'convnext' else (0, 1)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=stages, norm=False, intermediates_only=True)
        assert all(map(torch.equal, model(images), expected))


def test_nothing_is_left_of_a_patch_of_the_last_blocks(tmp_path: Path) -> None:
    sem_timm.save_patch(patch(base(), ('sem', {'target': ['layer4']})), tmp_path)
    model = backbone('resnet', base(), out_indices=(0, 1))
    with refused(model, PatchFileError, 'for layer4.0', 'Nothing of the patch is left'):
        sem_timm.load_patch(model, tmp_path, missing='skip')


def test_only_the_end_may_be_missing(tmp_path: Path) -> None:
    sem_timm.save_patch(patch(timm.create_model('resnet34')), tmp_path / '34')
    sem_timm.save_patch(patch(timm.create_model('resnet18')), tmp_path / '18')
    sem_timm.save_patch(patch(timm.create_model('resnet50', layers=(1, 1, 1, 1))), tmp_path / '50')
    wrong: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
        ('34', 'resnet18', {}, ("no tensor 'layer1.2.conv1.weight'", "'layer2.0.conv1.weight', which comes later")),
        ('18', 'resnet34', {}, ("its tensor 'layer1.2.conv1.weight' is not known to the patch",)),
        ('18', 'resnet18d', {}, ("no tensor 'conv1.weight'", "'bn1.weight', which comes later")),
        ('50', 'wide_resnet50_2', {'layers': (1, 1, 1, 1)}, ('layer1.0.conv1.weight has the shape (128', '(64')),
        ('50', 'regnety_002', {}, ("'conv1.weight'",)),
    ]
    for patch_of, name, options, parts in wrong:
        for wrapping in ({}, {'features_only': True}):
            model: Any = timm.create_model(name, **options, **wrapping)
            model.pretrained_cfg = model.default_cfg = None  # by which timm tells what it is
            with refused(model, PatchFileError, 'is not the same network', *parts):
                sem_timm.load_patch(model, tmp_path / patch_of, check_base='ignore', missing='skip')


def test_other_base_weights_are_noticed_in_a_backbone(tmp_path: Path) -> None:
    sem_timm.save_patch(patch(base()), tmp_path)
    model = backbone('resnet', lively(base(), torch.Generator().manual_seed(3)))
    with refused(model, PatchFileError, 'fingerprints', 'conv1.1.weight has other values'):
        sem_timm.load_patch(model, tmp_path, check_base='error')
