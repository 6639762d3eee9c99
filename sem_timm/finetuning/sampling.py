"""Which samples go into which batch, as a function of seed, epoch, step and process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from sem_timm.finetuning.samples import Key


@dataclass(frozen=True)
class Share:
    """What one process computes of each update.

    Attributes:
        rank: Number of this process.
        num_processes: Number of all.
        batch_size: Images of one update, of all processes together.
        accumulate: Parts in which an update is computed.
    """

    rank: int
    num_processes: int
    batch_size: int
    accumulate: int = 1

    @property
    def part_size(self) -> int:
        """Images that one process computes at a time."""
        return self.batch_size // (self.num_processes * self.accumulate)


class TrainingBatches(Sampler[list[Key]]):
    """Batches of one process: the order of an epoch is drawn once, and each update's images are shared out.

    With the same seed any number of processes computes the same updates. Set ``epoch`` and ``start``, the number of
    updates that are done already, before iterating. Images that do not fill an update are left out of the epoch.
    """

    def __init__(self, num_samples: int, share: Share, seed: int) -> None:
        self.num_samples = num_samples
        self.share = share
        self.seed = seed
        self.epoch = 0
        self.start = 0

    @property
    def num_updates(self) -> int:
        """Updates in an epoch."""
        return self.num_samples // self.share.batch_size

    def __len__(self) -> int:
        return (self.num_updates - self.start) * self.share.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        share, size = self.share, self.share.part_size
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for update in range(self.start, self.num_updates):
            for part in range(share.accumulate):
                first = update * share.batch_size + (part * share.num_processes + share.rank) * size
                yield [(self.epoch, position) for position in order[first : first + size]]


class ValidationBatches(Sampler[list[Key]]):
    """Batches of one process that together hold every sample once, in order.

    All processes have the same number of batches. Those without a sample left get the first one instead, which
    `num_real` leaves out of the count.
    """

    def __init__(self, num_samples: int, rank: int, num_processes: int, size: int) -> None:
        self.num_samples = num_samples
        self.rank = rank
        self.num_processes = num_processes
        self.size = size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.size * self.num_processes))

    def num_real(self, batch: int) -> int:
        """How many samples of a batch count; they come first."""
        first = (batch * self.num_processes + self.rank) * self.size
        return max(0, min(self.size, self.num_samples - first))

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            first = (batch * self.num_processes + self.rank) * self.size
            yield [(0, position) for position in range(first, first + self.num_real(batch))] or [(0, 0)]
