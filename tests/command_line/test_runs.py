"""The commands that open a finished run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import sem_timm
from sem_timm.command_line import main
from sem_timm.finetuning.runs import open_run
from tests.finetuning.small_runs import CLASSES, write_images
from tests.lively import lively

QUICK = ['--no-pretrained', '--image-size', '16', '--epochs', '1', '--no-compare', '--no-progress', '--json']


@pytest.fixture(scope='module')
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base in which gates act and learn: in timm's initial weights the branches are zero."""
    folder = tmp_path_factory.mktemp('runs')
    weights = folder / 'weights.pth'
    torch.save(lively(timm.create_model('test_resnet', num_classes=10)).state_dict(), weights)
    quick = [option for option in QUICK if option != '--no-pretrained']
    arguments = ['finetune', 'test_resnet', *quick, '--weights', str(weights), '--freeze-base', '--lr', '0.05']
    assert main([*arguments, '--output', str(folder / 'gated')]) == 0
    return folder / 'gated'


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
        expected = run.model(images)
        assert torch.equal(fresh.eval()(images), expected)
        with sem_timm.disabled(fresh):
            assert not torch.allclose(fresh(images), expected, rtol=1e-2, atol=1e-2)
    assert not (attending / 'patch').exists()


def test_decisions_are_printed_and_drawn(gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / 'decisions.png'
    assert main(['decisions', str(gated), '--plot', str(picture), '--max-batches', '2']) == 0
    assert 'layer3.0' in capsys.readouterr().out and picture.read_bytes().startswith(b'\x89PNG')
    assert main(['decisions', str(gated), '--max-batches', '1', '--by-class', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['operators'] == ['se', 'eca', 'ie']


def test_decisions_by_class_have_the_names_of_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = write_images(tmp_path / 'data'), tmp_path / 'run'
    small = ['finetune', 'test_resnet', *QUICK, '--cpu', '--batch-size', '8']
    assert main([*small, '--data', str(data), '--output', str(folder)]) == 0
    capsys.readouterr()
    assert main(['decisions', str(folder), '--by-class', '--json']) == 0
    assert tuple(json.loads(capsys.readouterr().out)['classes']) == CLASSES
    assert main(['decisions', str(folder), '--by-class']) == 0
    shown = capsys.readouterr().out
    assert all(f'{name}: 0.' in shown for name in CLASSES)
    assert open_run(folder).classes == CLASSES


def test_transfer_keeps_what_it_made(attending: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / 'swapped'
    options = ['--set', 'memory=8', '--transfer', 'steps=2', '--output', str(output), '--json']
    assert main(['transfer', str(attending), *options]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(['transfer', str(output)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f'sem-timm: {output} has external in place of self-attention already')
    assert 'sem-timm finetune test_vit --operation none --data digits' in message and message.count('\n') == 1
    again = open_run(output).model
    model = open_run(attending).model
    sem_timm.load_patch(model, output / 'patch', check_base='error')
    assert model.get_submodule('blocks.0.attn.core').memory == 8
    images = next(iter(open_run(attending).validation))[0]
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


def test_fold_leaves_a_file_for_timm_alone(gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / 'new' / 'folded.safetensors'
    assert main(['fold', str(gated), '--output', str(output)]) == 0
    *_, accuracy, way = capsys.readouterr().out.splitlines()
    assert accuracy.startswith('Top-1 accuracy: ') and way.startswith("Weights: timm.create_model('test_resnet', check")
    compute = f'model = {way.removeprefix("Weights: ")}; torch.save(model.eval()(torch.ones(2, 3, 16, 16)), "out")'
    code = f'import sys, timm, torch; {compute}; assert "sem_timm" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = open_run(gated).model
    assert main(['fold', str(gated), '--json', '--max-batches', '2']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['is_plain'] and result['num_folded'] == 4
    run = open_run(gated)
    assert sem_timm.fold_gates(model, run.validation).accuracy_after == pytest.approx(
        float(accuracy.split()[-3]), abs=0.01
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / 'out'), model(torch.ones(2, 3, 16, 16)), rtol=1e-5, atol=1e-5)


def test_fold_writes_no_file_that_timm_could_not_load(
    gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / 'folded.safetensors'
    assert main(['fold', str(gated), '--max-loss', '0', '--output', str(output)]) == 2
    printed = capsys.readouterr()
    assert 'its loss is above max_loss=0' in printed.out and not output.exists()
    assert (
        'could not be folded' in printed.err
        and 'Leave --max-loss out or raise it, or leave --output out' in printed.err
    )


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (['decisions', '/nowhere'], '/nowhere is not the folder of a finished run'),
        (['decisions', '{attending}'], 'has no Switchable Excitation Module'),
        (['transfer', '{attending}', '--transfer', 'bogus=1'], "option 'bogus' is unknown"),
        (['transfer', '{attending}', '--operation', 'sem'], "operation 'sem' is no attention"),
        (['transfer', '{gated}', '--output', '{gated}/swapped'], 'name one operation. Leave --output'),
        (['finetune', '--output', '{gated}/result.json'], 'result.json is a file; name a new folder'),
        (['finetune', '--output', '{gated}/patch'], 'patch exists and is not empty; name another --output'),
        (['transfer', '{attending}', '--output', '{attending}'], 'exists; name a new folder'),
        (['transfer', '{gated}'], 'nothing in ResNet can take external'),
        (['fold', '/nowhere'], '/nowhere is not the folder of a finished run'),
        (['fold', '{attending}'], 'has no gates that patch_model put in'),
        (['fold', '{gated}', '--output', 'folded.pth'], 'is no name of a .safetensors file, such as --output folded-f'),
        (['fold', '{gated}', '--output', '{gated}/model.safetensors'], 'exists; name a new file, such as --output'),
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


def test_the_blocks_that_can_do_without_softmax_are_searched_for(
    attending: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ['search', str(attending), '-o', 'linear', '--set', 'own=true', '--tolerance', '0.999']
    plot = tmp_path / 'front.png'
    assert main([*command, '--max-batches', '1', '--json', '--plot', str(plot)]) == 0
    front = json.loads(capsys.readouterr().out)['front']
    assert [len(point['swapped']) for point in front] == list(range(len(front))) and len(front) > 1
    assert plot.stat().st_size > 1000
    assert main([*command, '--max-batches', '1', '--json', '--exclude', 'blocks.0.attn']) == 0
    swapped = {name for point in json.loads(capsys.readouterr().out)['front'] for name in point['swapped']}
    assert len(swapped) == len(front) - 2 and 'blocks.0.attn' not in swapped
    assert main(['search', str(attending), '-o', 'sem']) == 2
    assert "operation 'sem' is no attention" in capsys.readouterr().err
