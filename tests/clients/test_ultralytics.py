"""The training of detectors by ultralytics, which copies, fuses and pickles the model that it is given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

import sem_timm
from tests.clients.models import SIZE, Models, assert_close, images
from tests.lively import lively
from tests.twins import trained

PROGRAM = 'ultralytics'
PACKAGES = ('ultralytics',)


@pytest.fixture
def given() -> Models:
    """A detector of one class, with gates and without."""
    torch.manual_seed(0)
    plain = lively(DetectionModel('yolo11n.yaml', nc=1, verbose=False))
    patched = sem_timm.patch_model(copy.deepcopy(plain), input_size=(3, SIZE, SIZE))
    return Models(plain, patched, trained(copy.deepcopy(patched)))


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """The description of a set of images with a square in each."""
    random = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (tmp_path / kind).mkdir()
    for number in range(4):
        pixels = random.integers(0, 100, (SIZE, SIZE, 3))
        pixels[16:48, 16:48] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'images' / f'{number}.png')
        (tmp_path / 'labels' / f'{number}.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'data.yaml').write_text(f'path: {tmp_path}\ntrain: images\nval: images\nnames: [square]\n')
    return tmp_path / 'data.yaml'


def train(model: Any, data: Path) -> DetectionTrainer:
    class Trainer(DetectionTrainer):  # type: ignore[misc, unused-ignore]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            return copy.deepcopy(model)

    options: dict[str, Any] = dict(epochs=1, imgsz=SIZE, batch=4, workers=0, optimizer='SGD', warmup_epochs=0)
    quiet: dict[str, Any] = dict(plots=False, verbose=False, device='cpu', amp=False, project=str(data.parent / 'runs'))
    trainer: Any = Trainer(overrides={'model': 'yolo11n.yaml', 'data': str(data), **options, **quiet})
    trainer.train()
    return trainer


def test_training(given: Models, squares: Path) -> None:
    """Losses of the first step of `DetectionTrainer`, and that gates are trained"""
    given.compare(lambda model: train(model, squares).tloss, 1e-5)
    trained_model = train(given.patched, squares).model
    before = dict(given.patched.named_parameters())
    moved = [name for name, p in trained_model.named_parameters() if not torch.equal(p, before[name])]
    assert any('.sem.decision.' in name for name in moved)


def test_checkpoints(given: Models, squares: Path) -> None:
    """The pickled checkpoint of a training: it holds the gates, fuses, and computes what it did before"""
    checkpoint = YOLO(train(given.stirred, squares).last)
    model = checkpoint.model.float().eval()

    def raw(model: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(images())[0]
        return out

    assert len(sem_timm.patched_modules(model)) == len(sem_timm.patched_modules(given.stirred)) > 0
    expected = raw(model)
    assert_close(raw(copy.deepcopy(model).fuse(verbose=False)), expected, 1e-4)
    assert not torch.allclose(raw(sem_timm.unpatch_model(copy.deepcopy(model))), expected, rtol=1e-3)
