"""Single samples: read, checked, and augmented by random numbers of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from sem_timm.finetuning.errors import DataError, first_sentence
from sem_timm.random_state import preserved_random_state


@dataclass(frozen=True)
class LabelCheck:
    """Lets labels pass that a model can learn.

    Attributes:
        data: Name of the data, for messages.
        num_classes: Number of classes.
        renumbered: Where other data had the classes in another order, the number of each there.
    """

    data: str
    num_classes: int
    renumbered: tuple[int, ...] = ()

    def __call__(self, label: int | None) -> int:
        """The label.

        Raises:
            DataError: If there is none, or it is that of a class too many.
        """
        if label is None or label < 0:
            raise DataError(
                f'{self.data} has images without a label, as test images that are published without their classes. '
                'Name another split, or put the images of each class into a folder of it.'
            )
        if label >= self.num_classes:
            raise DataError(
                f'{self.data} has the label {label}, and the labels of {self.num_classes} classes are 0 to '
                f'{self.num_classes - 1}; give --num-classes {label + 1}, or more.'
            )
        return self.renumbered[label] if self.renumbered else label


Key = tuple[int, int]  # epoch, and position of the sample

_MOST_RETRIES = 100

# Of an image that is not to be measured.
NO_LABEL = -1


class Samples(Dataset[Any]):
    """A view of a dataset whose samples are augmented by the same random numbers wherever they are read.

    The random numbers of a sample depend on the seed, the epoch and the sample alone. So a run that is resumed, or has
    another number of processes, sees the same images.

    Args:
        dataset: Yields pairs of an image and a label.
        seed: Seed of the augmentation.
        check: What labels go through.
        indices: Which samples of it; by default all.
        skip_bad_images: Whether an image that cannot be read is replaced by the next one, and counted.
        measured: Whether accuracy is measured on them, so that what replaces an image gets the label `NO_LABEL`.
    """

    transform: Callable[[Image.Image], Any] | None = None  # set by timm's create_loader
    mode = 'RGB'  # of PIL, that images are converted to; 'L' for a model of grey ones

    def __init__(
        self,
        dataset: Any,
        seed: int,
        check: Callable[[int | None], int],
        indices: Sequence[int] | None = None,
        skip_bad_images: bool = False,
        measured: bool = False,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.indices = range(len(dataset)) if indices is None else indices
        self.skip_bad_images = skip_bad_images
        self.measured = measured
        self.check = check
        # Shared, so that what worker processes find is known to the process that counts.
        self.bad = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, position = key
        for retry in range(min(_MOST_RETRIES, len(self))):
            current = (position + retry) % len(self)
            try:
                image, label = self._read(self.indices[current])
                break
            except Exception as error:  # PIL, tarfile and the readers each have their own kinds
                if not self.skip_bad_images:
                    raise DataError(
                        f'cannot read image {self.name(current)}: {first_sentence(error)}. Repair or remove it, or use '
                        '--skip-bad-images.'
                    ) from error
                self.bad[current] = True
        else:
            raise DataError(f'{retry + 1} images in a row cannot be read, the last one {self.name(current)}.')
        label = NO_LABEL if self.measured and retry else self.check(label)
        with own_random_numbers((self.seed, epoch, position)):
            return (image if self.transform is None else self.transform(image)), label

    def _read(self, index: int) -> tuple[Image.Image, int | None]:
        if isinstance(self.dataset, ImageDataset):
            # Past its own reading, which logs that it skips what it cannot read, and then shows another image.
            file, label = self.dataset.reader[index][:2]
            with file:
                return in_mode(Image.open(file), self.mode), None if label is None else int(label)
        image, label = self.dataset[index][:2]
        return in_mode(image, self.mode), None if label is None else int(label)

    def content(self, position: int) -> bytes:
        """What a sample is made of, whatever reads images and wherever they are: its label and file, or its pixels."""
        index = self.indices[position]
        if isinstance(self.dataset, ImageDataset):
            file, label = self.dataset.reader[index][:2]
            with file:
                return f'{label} '.encode() + file.read()
        image, label = self.dataset[index][:2]
        return f'{int(label)} {image.size} '.encode() + image.tobytes()

    def name(self, position: int) -> str:
        """The file of a sample where there is one, else its number."""
        index = self.indices[position]
        try:
            return str(self.dataset.filename(index, absolute=True))
        except (AttributeError, NotImplementedError, AssertionError):
            files = getattr(self.dataset, 'samples', getattr(self.dataset, 'imgs', None))
            return str(files[index][0]) if files else f'number {index} of the data'


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in another mode of PIL, which by itself makes white of all that is above 255; of 16 bits 8 are kept.

    Raises:
        ValueError: If its pixels are numbers whose range nobody knows, such as 12 bits, or parts of one.
    """
    if image.mode[0] not in 'IF':
        return image.convert(mode)
    pixels = np.asarray(image)
    lowest, highest = pixels.min(), pixels.max()
    has_8_bits = lowest >= 0 and highest <= 255 and not (image.mode == 'F' and 0 < highest <= 1)
    has_16_bits = lowest >= 0 and 4096 <= highest <= 65535 and image.mode != 'F'
    if not has_8_bits and not has_16_bits:
        raise ValueError(
            f'its pixels are numbers from {lowest} to {highest} of mode {image.mode!r}; save them as 8 bits, or '
            'stretched to 16'
        )
    return Image.fromarray((pixels / (1 if has_8_bits else 257)).round().astype(np.uint8)).convert(mode)


@contextmanager
def own_random_numbers(seed: tuple[int, ...]) -> Iterator[None]:
    """Seeds the generators that timm's transforms draw from; afterwards they are where they were."""
    words = np.random.SeedSequence(seed).generate_state(3)
    with preserved_random_state(on_gpus=False):
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
        yield
