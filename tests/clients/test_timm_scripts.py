"""The scripts of timm's repository, which its wheel lacks: they are taken from the checkout that TIMM_REPOSITORY names.

They run with the timm that is installed, by `sem_timm.run`, as examples/timm_train.md says.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tests.clients.models import images
from tests.families import create
from tests.twins import trained

PROGRAM = 'timm'
PACKAGES = ('timm',)

pytestmark = pytest.mark.clients

REPOSITORY = Path(os.environ.get('TIMM_REPOSITORY', ''))
BASE, VARIANT = 'test_resnet', 'test_resnet_sem'
CLASSES = 3


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in ``train/`` and ``validation/``, of classes that differ in colour."""
    folder, random = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for split, count in (('train', 8), ('validation', 5)):
        for label in range(CLASSES):
            (folder / split / f'class{label}').mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 160, (64, 64, 3))
                pixels[..., label] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f'class{label}' / f'{number}.png')
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of the base, with norms that do not hide what is done to a branch."""
    torch.save(create(BASE, num_classes=CLASSES).state_dict(), tmp_path / 'base.pth')
    return tmp_path / 'base.pth'


@pytest.fixture
def stirred(tmp_path: Path, base: Path) -> Path:
    """A checkpoint of the variant on that base, with gates that do something."""
    torch.save(trained(variant(base)).state_dict(), tmp_path / 'stirred.pth')
    return tmp_path / 'stirred.pth'


def variant(checkpoint: Path) -> Any:
    return timm.create_model(VARIANT, num_classes=CLASSES, checkpoint_path=str(checkpoint)).eval()


def run(script: str, *arguments: Any, folder: Path) -> str:
    """Runs a script of timm's repository with the timm that is installed; returns what it prints."""
    shutil.copy(REPOSITORY / script, folder)
    command = [sys.executable, '-m', 'sem_timm.run', str(folder / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(images())
    return out


def test_train(tmp_path: Path, photos: Path, base: Path) -> None:
    """`train.py --initial-checkpoint` of the base: losses of the first epoch; gates are trained, saved and resumed"""

    def summary(model: str, name: str, *arguments: Any) -> list[dict[str, str]]:
        options = ['--model', model, '--num-classes', CLASSES, '--initial-checkpoint', base, '--img-size', 64]
        # One batch of all images: new modules draw numbers, so that what is drawn later, such as an order, is other.
        options += ['--device', 'cpu', '-j', 0, '-b', 8 * CLASSES, '--no-aug', '--warmup-epochs', 0, '--sched', 'step']
        where = ['--output', tmp_path, '--experiment', name, '--data-dir', photos]
        run('train.py', *options, *where, *arguments, folder=tmp_path)
        with open(tmp_path / name / 'summary.csv', newline='') as file:
            return list(csv.DictReader(file))

    still = ['--epochs', 1, '--lr', 1e-12, '--weight-decay', 0]  # 0 would be none given
    plain, patched = (summary(model, f'still_{model}', *still) for model in (BASE, VARIANT))
    for key in ('train_loss', 'eval_loss', 'eval_top1'):
        assert float(patched[0][key]) == pytest.approx(float(plain[0][key]), rel=1e-6)
    moving = ['--opt', 'adamw', '--lr', 1e-2]
    summary(VARIANT, 'moving', *moving, '--epochs', 1)
    last = tmp_path / 'moving' / 'last.pth.tar'
    before, after = variant(base).state_dict(), variant(last).state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if '.sem.decision.' in key)
    rows = summary(VARIANT, 'resumed', *moving, '--epochs', 2, '--resume', last)
    assert [row['epoch'] for row in rows] == ['1']
    assert rows[0]['train_loss'] != plain[0]['train_loss']


def test_validate(tmp_path: Path, photos: Path, base: Path, stirred: Path) -> None:
    """`validate.py`: loss and accuracy, with the checkpoint of a base in a variant, and with the variant's own"""

    def loss(model: str, checkpoint: Path) -> tuple[float, float]:
        options = ['--model', model, '--checkpoint', checkpoint, '--num-classes', CLASSES, '--img-size', 64]
        printed = run('validate.py', *options, '--device', 'cpu', '-j', 0, '--data-dir', photos, folder=tmp_path)
        found = json.loads(printed[printed.rindex('{') : printed.rindex('}') + 1])
        top1 = re.search(r'Acc@1: +[\d.]+ \( *([\d.]+)\)', printed)
        assert top1 is not None
        return float(re.findall(r'Loss: +[\d.]+ \(([\d.]+)\)', printed)[-1]), found['top1']

    assert loss(VARIANT, base) == loss(BASE, base)
    assert loss(VARIANT, stirred) != loss(BASE, base)


def test_onnx_export(tmp_path: Path, stirred: Path) -> None:
    """`onnx_export.py`, by either exporter: what onnxruntime makes of the file"""
    onnxruntime = pytest.importorskip('onnxruntime')
    expected = outputs(variant(stirred))
    for exporter in ([], ['--dynamo']):
        options = ['--model', VARIANT, '--checkpoint', stirred, '--num-classes', CLASSES, '--img-size', 64]
        run('onnx_export.py', *options, '-b', len(expected), *exporter, tmp_path / 'model.onnx', folder=tmp_path)
        session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
        (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_benchmark(tmp_path: Path) -> None:
    """`benchmark.py`: inference and training of a variant, and how many parameters it has"""
    size = ['--num-classes', CLASSES, '--img-size', 64, '-b', 2, '--device', 'cpu', '--no-retry']
    rounds = ['--num-warm-iter', 1, '--num-bench-iter', 5]
    for model in (BASE, VARIANT):
        results = tmp_path / f'{model}.json'
        format = ['--results-file', results, '--results-format', 'json']
        run('benchmark.py', '--model', model, *size, *rounds, *format, folder=tmp_path)
        (row,) = found if isinstance(found := json.loads(results.read_text()), list) else [found]
        parameters = sum(p.numel() for p in timm.create_model(model, num_classes=CLASSES).parameters())
        assert row['param_count'] == round(parameters / 1e6, 2)
        assert row['infer_samples_per_sec'] > 0 and row['train_samples_per_sec'] > 0


def test_avg_checkpoints(tmp_path: Path, base: Path, stirred: Path) -> None:
    """`avg_checkpoints.py`: the mean of two checkpoints of a variant, gates among them"""
    (tmp_path / 'two').mkdir()
    models = [variant(base), variant(stirred)]
    for number, model in enumerate(models):
        checkpoint = {'state_dict': model.state_dict(), 'metric': number, 'epoch': number}
        torch.save(checkpoint, tmp_path / 'two' / f'checkpoint-{number}.pth.tar')
    run('avg_checkpoints.py', '--input', tmp_path / 'two', '--output', tmp_path / 'mean.pth', folder=tmp_path)
    means = variant(tmp_path / 'mean.pth').state_dict()
    for key, (one, other) in {k: [m.state_dict()[k] for m in models] for k in means}.items():
        torch.testing.assert_close(means[key], ((one.double() + other.double()) / 2).to(one.dtype))


def test_clean_checkpoint(tmp_path: Path, stirred: Path) -> None:
    """`clean_checkpoint.py`: a checkpoint of a variant without what only training needs, in both formats"""
    model = variant(stirred)
    raw = {f'module.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': raw, 'optimizer': {}}, tmp_path / 'raw.pth.tar')
    for suffix, options in (('.pth', []), ('.safetensors', ['--safetensors'])):
        clean = tmp_path / f'clean{suffix}'
        where = ['--checkpoint', tmp_path / 'raw.pth.tar', '--output', clean, '--no-hash']
        run('clean_checkpoint.py', *where, *options, folder=tmp_path)
        assert torch.equal(outputs(variant(clean)), outputs(model))
        assert not any(key.startswith('module.') for key in timm.models.load_state_dict(str(clean)))
