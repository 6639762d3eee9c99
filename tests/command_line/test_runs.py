"""The commands that open a finished run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import sem_timm
from sem_timm.command_line import main
from sem_timm.finetuning.runs import open_run

QUICK = ['--no-pretrained', '--image-size', '16', '--epochs', '1', '--no-compare', '--no-progress', '--json']


@pytest.fixture(scope='module')
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'gated'
    assert main(['finetune', 'test_resnet', *QUICK, '--freeze-base', '--output', str(folder)]) == 0
    return folder


@pytest.fixture(scope='module')
def attending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'attending'
    arguments = ['finetune', 'test_vit', *QUICK, '--operation', 'none', '--output', str(folder)]
    assert main(arguments) == 0
    return folder


def test_a_run_is_opened_with_its_weights(gated: Path) -> None:
    run = open_run(gated)
    result = json.loads((gated / 'result.json').read_text())
    with torch.no_grad():
        right = sum(int((run.model(images).argmax(1) == labels).sum()) for images, labels in run.validation)
    assert right / result['num_images'][1] == pytest.approx(result['after'])
    assert len(list(run.training)) == len(run.training) == result['num_steps']


def test_a_run_with_a_frozen_base_leaves_a_patch_file(gated: Path, attending: Path) -> None:
    run = open_run(gated)
    fresh = timm.create_model('test_resnet', num_classes=10)
    base = {n: t for n, t in run.model.state_dict().items() if n in fresh.state_dict()}
    fresh.load_state_dict(base)
    sem_timm.load_patch(fresh, gated / 'patch', check_base='error')
    images = next(iter(run.validation))[0]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), run.model(images))
    assert not (attending / 'patch').exists()


def test_decisions_are_printed_and_drawn(gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / 'decisions.png'
    assert main(['decisions', str(gated), '--plot', str(picture), '--max-batches', '2']) == 0
    assert 'layer3.0' in capsys.readouterr().out and picture.read_bytes().startswith(b'\x89PNG')
    assert main(['decisions', str(gated), '--max-batches', '1', '--by-class', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['operators'] == ['se', 'eca', 'ie']


def test_transfer_keeps_what_it_made(attending: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / 'swapped'
    options = ['--set', 'memory=8', '--transfer', 'steps=2', '--output', str(output), '--json']
    assert main(['transfer', str(attending), *options]) == 0
    assert json.loads(capsys.readouterr().out)
    again = open_run(output).model
    model = open_run(attending).model
    sem_timm.load_patch(model, output / 'patch', check_base='error')
    assert model.get_submodule('blocks.0.attn.core').memory == 8
    images = next(iter(open_run(attending).validation))[0]
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (['decisions', '/nowhere'], '/nowhere is not the folder of a finished run'),
        (['decisions', '{attending}'], 'has no Switchable Excitation Module'),
        (['transfer', '{attending}', '--transfer', 'bogus=1'], "option 'bogus' is unknown"),
        (['transfer', '{attending}', '--operation', 'sem'], "operation 'sem' is no attention"),
        (['transfer', '{attending}', '--output', '{attending}'], 'exists; name a new folder'),
        (['transfer', '{gated}'], 'nothing in ResNet can take external'),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], part: str, gated: Path, attending: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([text.format(gated=gated, attending=attending) for text in arguments]) == 2
    printed = capsys.readouterr().err
    assert part in printed and printed.count('\n') == 1


def test_weights_that_do_not_fit_are_named(gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('options.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((gated / name).read_bytes()[: None if name == 'options.json' else 100])
    assert main(['decisions', str(tmp_path)]) == 2
    assert 'model.safetensors does not hold the weights' in capsys.readouterr().err
