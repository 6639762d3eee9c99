"""The examples of fine-tuning."""

from __future__ import annotations

import gzip
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.finetuning.small_runs import run_small

EXAMPLES = Path(__file__).parents[1] / 'examples'


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
    path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(header + array.tobytes()))


def test_options_of_the_example_make_a_run(tmp_path: Path) -> None:
    options = load('finetune').options
    assert options.data == 'digits' and options.operation_options == {'reduction': 8}
    assert len((EXAMPLES / 'finetune.py').read_text().splitlines()) <= 22


def test_fashion_mnist_is_written_out_as_images(tmp_path: Path) -> None:
    example = load('fashion_mnist')
    images = np.random.RandomState(0).randint(0, 255, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for prefix in ('train', 't10k'):
        write_idx(tmp_path / f'{prefix}-images-idx3-ubyte', images)
        write_idx(tmp_path / f'{prefix}-labels-idx1-ubyte', labels)
    folder = example.write_images(tmp_path, tmp_path / 'out', most=30)
    assert len(list((folder / 'train').rglob('*.png'))) == 30
    assert np.array_equal(np.asarray(Image.open(folder / 'validation' / 'sneaker' / '00017.png')), images[17])
    result = run_small(folder, tmp_path / 'run', epochs=1)
    assert result.num_images == (30, 30)


def test_fashion_mnist_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='apt-get install dataset-fashion-mnist'):
        load('fashion_mnist').write_images(tmp_path, tmp_path / 'out')


def test_commands_of_the_swap_are_those_of_the_guide() -> None:
    example = load('swap_trained_vit')
    guide = (EXAMPLES.parent / 'docs' / 'guides' / 'attention.md').read_text()
    shown = re.sub(r' \\\n +', ' ', guide)
    for command in example.COMMANDS:
        assert f'$ {command}\n' in shown
    assert example.as_run('sem-timm search run')[1:] == ['-m', 'sem_timm', 'search', 'run']
    assert Path(example.as_run(example.COMMANDS[0])[1]).is_file()
