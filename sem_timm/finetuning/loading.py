"""Batches of a run: timm's loaders, over batches of our own choice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from sem_timm.finetuning.datasets import Data
from sem_timm.finetuning.errors import DataError, first_sentence
from sem_timm.finetuning.options import BUILT_IN, FinetuneOptions
from sem_timm.finetuning.samples import Samples
from sem_timm.finetuning.sampling import Share, TrainingBatches, ValidationBatches

Batch = tuple[Tensor, Tensor]


class TrainingLoader:
    """Training batches of one process, from any update of any epoch on."""

    def __init__(
        self, data: Data, options: FinetuneOptions, config: dict[str, Any], share: Share, device: torch.device
    ) -> None:
        self.share = share
        self._device = device
        self._loader = _create(data.train, options, config, share.part_size, device, is_training=True)
        self._batches: TrainingBatches | None = None
        if isinstance(data.train, Samples):
            self._batches = TrainingBatches(len(data.train), share, options.seed)
            self._loader = _with_batches(self._loader, self._batches)

    @property
    def num_updates(self) -> int:
        """Updates in an epoch; of a stream, as its information says."""
        return self._batches.num_updates if self._batches else max(1, len(self._loader) // self.share.accumulate)

    def parts(self, epoch: int, start: int) -> Iterator[Batch]:
        """The parts of the updates of an epoch, without the first ``start`` updates."""
        if self._batches is not None:
            self._batches.epoch, self._batches.start = epoch, start
            yield from _read(self._loader, self._device)
            return
        done = start * self.share.accumulate
        while True:  # the streams of several processes may differ in length
            if hasattr(self._loader.dataset, 'set_epoch'):
                self._loader.dataset.set_epoch(epoch)
            number = -1
            for number, batch in enumerate(_read(self._loader, self._device)):
                if number >= done:
                    yield batch
            if number < 0:
                raise DataError(
                    'the stream of training data yields no batch; are there fewer images than --batch-size?'
                )
            done = 0


class ValidationLoader:
    """Validation batches of one process, with the number of samples that count in each."""

    def __init__(
        self, data: Data, options: FinetuneOptions, config: dict[str, Any], share: Share, device: torch.device
    ) -> None:
        self._device = device
        self._loader = _create(data.validation, options, config, share.part_size, device, is_training=False)
        self._batches: ValidationBatches | None = None
        if isinstance(data.validation, Samples):
            size = max(share.part_size, min(64, -(-len(data.validation) // share.num_processes)))
            self._batches = ValidationBatches(len(data.validation), share.rank, share.num_processes, size)
            self._loader = _with_batches(self._loader, self._batches)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for number, (images, labels) in enumerate(_read(self._loader, self._device)):
            yield images, labels, self._batches.num_real(number) if self._batches else len(labels)


def _create(
    dataset: Any, options: FinetuneOptions, config: dict[str, Any], size: int, device: torch.device, is_training: bool
) -> Any:
    flip = options.data != BUILT_IN if options.flip is None else options.flip
    loader: Any = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=size,
        is_training=is_training,
        re_prob=options.random_erasing,
        re_mode='pixel',
        scale=(options.scale, 1.0),
        hflip=0.5 if flip else 0.0,
        color_jitter=0.0 if options.is_built_in else 0.4,
        auto_augment=options.auto_augment,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        device=device,
        pin_memory=device.type == 'cuda',
        # timm's prefetcher erases with random numbers of the training process, one batch ahead: those of a resumed
        # run would differ. Without it each sample is erased with its own.
        use_prefetcher=device.type == 'cuda' and not options.random_erasing,
    )
    batches = _inside(loader)
    batches.worker_init_fn = _WorkerInit(batches.worker_init_fn)
    return loader


def _inside(loader: Any) -> Any:
    """torch's own loader, which timm's prefetcher may be around."""
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def _with_batches(loader: Any, batches: Sampler[Any]) -> Any:
    """A loader of the given batches; torch's loaders cannot be told so once they exist, so it is made anew."""
    old = _inside(loader)
    new: Any = DataLoader(
        old.dataset,
        batch_sampler=batches,
        num_workers=old.num_workers,
        collate_fn=old.collate_fn,
        pin_memory=old.pin_memory,
        worker_init_fn=old.worker_init_fn,
        # Beginning an epoch draws a number; with its own generator it leaves alone the one that is saved.
        generator=torch.Generator(),
        persistent_workers=old.num_workers > 0,
    )
    if not isinstance(loader, PrefetchLoader):
        return new
    loader.loader = new
    return loader


class _WorkerInit:
    """Lets the training process decide what a signal means; it ends its workers itself."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        # In a group of its own a worker does not get what a terminal or launcher sends to the whole group.
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.excepthook = _tell_but_lost_connections
        if self.then is not None:
            self.then(worker)


def _tell_but_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In a worker: the training process may go while it is handed a batch, and then there is nobody to tell."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _read(loader: Any, device: torch.device) -> Iterator[Batch]:
    try:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except DataError as error:
        # From a worker it comes with the worker's traceback as its text.
        raise DataError(str(error).strip().rsplit('DataError: ', 1)[-1]) from error.__cause__
    except Exception as error:
        if not isinstance(loader.dataset, IterableDataset):
            raise
        # Each library that streams has its own kinds. From a worker they come with its traceback, whose end tells most.
        lines = str(error).strip().splitlines()
        told = lines[-1] if lines and lines[0].startswith('Caught ') else first_sentence(error)
        raise DataError(
            f'the stream of data broke off: {told}. Repair or leave out what it names; data that is not streamed, such '
            'as a folder, can go on with --skip-bad-images.'
        ) from error
