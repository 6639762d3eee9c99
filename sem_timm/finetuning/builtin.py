"""The data that needs no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

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
