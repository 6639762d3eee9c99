"""The folder of solar cells: which class a cell is of, and which part."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / 'benchmarks' / 'solar_cells.py'


@pytest.fixture(scope='module')
def solar_cells() -> ModuleType:
    spec = importlib.util.spec_from_file_location('solar_cells', FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classes_are_kind_and_state(solar_cells: ModuleType, tmp_path: Path) -> None:
    lines = ['images/a.png  1.0  mono', 'images/b.png  0.3333333333333333  poly', 'images/c.png  0.6666666 mono']
    (tmp_path / 'labels.csv').write_text('\n'.join(lines))
    assert solar_cells.read_labels(tmp_path) == {
        'mono-defective': [tmp_path / 'images/a.png', tmp_path / 'images/c.png'],
        'poly-functional': [tmp_path / 'images/b.png'],
    }


def test_the_split_is_the_same_each_time_and_has_every_image_once(solar_cells: ModuleType) -> None:
    classes = {'one': [Path(f'{n}.png') for n in range(30)], 'two': [Path(f'x{n}.png') for n in range(10)]}
    found = solar_cells.split(classes, 20)
    assert found == solar_cells.split(classes, 20)
    assert {name: len(images) for name, images in found.items()} == {
        **{'train/one': 15, 'train/two': 5},
        **{'validation/one': 15, 'validation/two': 5},
    }
    assert sorted(image for images in found.values() for image in images) == sorted([*classes['one'], *classes['two']])
    with pytest.raises(SystemExit, match='There are 40 images'):
        solar_cells.split(classes, 40)
