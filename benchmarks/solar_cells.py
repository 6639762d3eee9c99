"""Writes the photographs of solar cells of the PyPI package `elpv-dataset` as a folder for `--data`.

    pip install elpv-dataset
    python benchmarks/solar_cells.py data/solar-cells

2,624 grey electroluminescence images of 300 x 300 pixels, https://github.com/zae-bayern/elpv-dataset, licence
CC-BY-NC-SA: for experiments, and no part of this package. Four classes: cells of mono- or polycrystalline silicon,
functional or defective. Experts gave each cell a probability of being defective, of 0, 1/3, 2/3 or 1; from 1/2 up it
counts as defective here. A fixed random part of each class is for validation. Neighbouring cells of one module may
be on both sides: the data does not tell them apart. Images are made smaller once, so that training need not do it
again and again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

NUM_VALIDATION = 1000
SEED = 0


def read_labels(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, in the order of the file of labels."""
    classes: dict[str, list[Path]] = {}
    for line in (folder / 'labels.csv').read_text(encoding='utf-8').splitlines():
        name, probability, kind = line.split()
        state = 'defective' if float(probability) > 0.5 else 'functional'
        classes.setdefault(f'{kind}-{state}', []).append(folder / name)
    return classes


def split(classes: Mapping[str, Sequence[Path]], num_validation: int) -> dict[str, list[Path]]:
    """The images of each folder, such as train/mono-defective; each class has its share of those for validation."""
    total = sum(map(len, classes.values()))
    if not 0 < num_validation < total:
        raise SystemExit(f'There are {total} images; leave some for training and some for validation.')
    found = {}
    for name, images in sorted(classes.items()):
        order = random.Random(f'{SEED} {name}').sample(list(images), len(images))
        count = round(num_validation * len(images) / total)
        found[f'validation/{name}'], found[f'train/{name}'] = order[:count], order[count:]
    return found


def installed() -> Path:
    """The folder of images and labels of the installed package."""
    spec = find_spec('elpv_dataset')
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('The images are those of a package. Do: pip install elpv-dataset')
    return Path(spec.submodule_search_locations[0]) / 'data'


def main() -> None:
    """Writes the folder and prints how many images are in which part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument('--size', type=int, default=96, help='height and width of the images that are written')
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise SystemExit(f'{arguments.folder} is there already; name a new folder.')
    for name, images in split(read_labels(installed()), NUM_VALIDATION).items():
        place = arguments.folder / name
        place.mkdir(parents=True)
        for image in images:
            with Image.open(image) as photograph:
                smaller = photograph.resize((arguments.size, arguments.size), Image.Resampling.LANCZOS)
            smaller.save(place / image.name)
        print(f'{name}: {len(images)}')


if __name__ == '__main__':
    main()
