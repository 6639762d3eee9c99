"""Weights of a run's model: loaded, or an error in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from sem_timm.errors import OptionError
from sem_timm.finetuning import FinetuneOptions, finetune, open_run
from sem_timm.finetuning.models import create_model
from tests.finetuning.small_runs import options, run_small


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


def test_model_for_grey_images_is_trained_on_them(images: Path, tmp_path: Path) -> None:
    result = run_small(images, tmp_path / 'run', epochs=1, model_options={'in_chans': 1})
    run = open_run(result.folder)
    assert run.input_size == (1, 16, 16)
    assert next(iter(run.validation))[0].shape[1:] == (1, 16, 16)
