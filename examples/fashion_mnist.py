"""Fashion-MNIST with SEM: 70,000 images of clothes from Debian's package dataset-fashion-mnist.

``python examples/fashion_mnist.py [FOLDER]``: the folder is where the four idx files are, by default where the package
puts them. They are written out once as an image folder, which `sem_timm.finetune` reads.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import sem_timm

USUAL_PLACE = Path('/usr/share/datasets/fashion-mnist')
CLASSES = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot')
SPLITS = {'train': 'train', 'validation': 't10k'}


def find_file(folder: Path, name: str) -> Path:
    """The idx file of that name, packed or not; exits with what to do if there is none."""
    for path in (folder / f'{name}.gz', folder / name):
        if path.is_file():
            return path
    sys.exit(
        f'There is no {name}.gz in {folder}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist. '
        'Elsewhere download the four idx files of Fashion-MNIST, and give their folder as the argument.'
    )


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file: two zero bytes, the type (8 for bytes), the number of axes, their lengths, the data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    if data[:3] != b'\0\0\x08':
        raise ValueError(f'{path} is no idx file of bytes.')
    lengths = np.frombuffer(data, '>i4', count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(lengths)


def write_images(source: Path, folder: Path, most: int | None = None) -> Path:
    """Writes ``folder/split/class/number.png``, at most so many images of a split."""
    for split, prefix in SPLITS.items():
        images = read_idx(find_file(source, f'{prefix}-images-idx3-ubyte'))[:most]
        labels = read_idx(find_file(source, f'{prefix}-labels-idx1-ubyte'))[:most]
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels)):
            Image.fromarray(image).save(folder / split / CLASSES[label] / f'{number:05d}.png')
    return folder


def main(arguments: list[str]) -> None:
    """Writes the images where they are not yet, and trains."""
    source, folder = Path(arguments[0]) if arguments else USUAL_PLACE, Path('fashion-mnist')
    if not folder.exists():
        write_images(source, folder)
    result = sem_timm.finetune(
        model='resnet10t', pretrained=False, data=str(folder), image_size=32, epochs=5, batch_size=128, workers=2
    )
    print(f'accuracy {result.before:.2%} before, {result.after:.2%} after; see {result.folder}')


if __name__ == '__main__':
    main(sys.argv[1:])
