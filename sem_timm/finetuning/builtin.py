"""The data that needs no download: scikit-learn's digits, and Fashion-MNIST where a system package has it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from sem_timm.finetuning.errors import DataError
from sem_timm.finetuning.options import BUILT_IN, FASHION, FinetuneOptions

FASHION_FOLDER = Path('/usr/share/datasets/fashion-mnist')  # of Debian's package dataset-fashion-mnist

_NUM_TEST = 360  # one in five
_SEED = 0


class Digits:
    """1,797 images of 8x8 pixels in ten classes, 1,437 of them for training; nothing is written to disk.

    The images are of the UCI test set of optical recognition of handwritten digits, which scikit-learn ships.

    Args:
        train: Whether to take the part for training or that for validation.
    """

    classes = tuple('0123456789')

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        order = np.random.RandomState(_SEED).permutation(len(digits.target))
        chosen = order[_NUM_TEST:] if train else order[:_NUM_TEST]
        self._images = (digits.images[chosen] * (255 / 16)).astype('uint8')
        self._labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), int(self._labels[index])


class FashionMnist:
    """Fashion-MNIST, 60,000 images of clothes for training and 10,000 for validation, 28x28 pixels in ten classes.

    Args:
        folder: Where the four idx files are, packed by gzip or not.
        train: Whether to take the part for training or that for validation.

    Attributes:
        images: (N, 28, 28) of bytes.
        labels: (N,) of bytes, the number of the class.

    Raises:
        DataError: If they are not there, or are damaged.
    """

    classes = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot')

    def __init__(self, folder: Path, train: bool) -> None:
        part = 'train' if train else 't10k'
        self.images = _read_idx(folder, f'{part}-images-idx3-ubyte')
        self.labels = _read_idx(folder, f'{part}-labels-idx1-ubyte')
        if self.images.ndim != 3 or len(self.images) != len(self.labels):
            raise DataError(f'{folder} holds no images with as many labels; get its files anew.')

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of a file: two zero bytes, 8 for the type byte, the number of axes, their lengths, the numbers."""
    for file in (folder / f'{name}.gz', folder / name):
        if file.is_file():
            break
    else:
        raise DataError(
            f'there is no {name}.gz in {folder}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist. '
            'Elsewhere give the folder with the four files of Fashion-MNIST as --data-root.'
        )
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == '.gz' else file.read_bytes()
        lengths = np.frombuffer(data, '>i4', count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(lengths)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f'{file} is damaged: {error}. Get it anew.') from error


def open_built_in(options: FinetuneOptions, train: bool) -> Digits | FashionMnist:
    """One part of the built-in data of a run."""
    if options.data == BUILT_IN:
        return Digits(train)
    assert options.data == FASHION
    return FashionMnist(Path(options.data_root or FASHION_FOLDER), train)
