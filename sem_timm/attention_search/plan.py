"""What a search came to: a plan for the blocks it found, with the front of agreement against cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sem_timm.reports.pictures import check_path, draw_front
from sem_timm.surgery import Plan
from sem_timm.tables import table


@dataclass(frozen=True)
class FrontPoint:
    """The model with some blocks swapped, the best found of so many.

    Attributes:
        swapped: Names of the swapped attention modules, in the order in which they were found.
        agreement: With the original, from 0 to 1: the part of the images that are named alike; of models without
            classes, the mean cosine of their outputs.
        distance: One less the mean cosine of the outputs to those of the original; tells apart what agrees alike.
        macs: Multiply-accumulate operations of a forward of one image.
        activation_bytes: What a training forward of one image keeps for the backward pass.
        seconds: Time of a forward of one image as it was tried, on whatever the machine did beside it.
    """

    swapped: tuple[str, ...]
    agreement: float
    distance: float
    macs: int
    activation_bytes: int
    seconds: float


@dataclass(frozen=True, repr=False)
class SearchedPlan(Plan):
    """A plan for the most blocks that keep the agreement asked for; `patch_model` takes it as any other.

    Attributes:
        front: What was found, from the original on, one more block swapped each time.
        tolerance: How much agreement could be lost.
        num_images: Number of images it was measured on.
    """

    front: tuple[FrontPoint, ...] = ()
    tolerance: float = 0.0
    num_images: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The plan as data that `json.dumps` takes."""
        found = {'tolerance': self.tolerance, 'num_images': self.num_images}
        return {**super().to_dict(), **found, 'front': [asdict(point) for point in self.front]}

    def plot(self, path: str | Path) -> None:
        """Draws agreement against multiply-accumulate operations, with the number of swapped blocks at each point.

        Raises:
            OptionError: If the path does not end like a picture, or its folder does not exist.
            MissingPackageError: If matplotlib is not installed.
        """
        points = [(point.macs / 1e9, 100 * point.agreement, len(point.swapped)) for point in self.front]
        title = f'{self.operation} in {self.model_name}: how many blocks of it keep what it says'
        labels = (
            'billions of multiply-accumulates per image; numbers are blocks swapped',
            f'agreement with the original, % of {self.num_images} images',
        )
        draw_front(check_path(path), points, labels, title)

    def __repr__(self) -> str:
        rows = [
            (
                str(len(point.swapped)),
                point.swapped[-1] if point.swapped else '(original)',
                f'{100 * point.agreement:.1f}',
                f'{point.distance:.4f}',
                f'{point.macs / 1e6:,.1f} M',
                f'{point.activation_bytes / 2**20:,.1f} MiB',
                f'{1e3 * point.seconds:,.1f}',
            )
            for point in self.front
        ]
        columns = ('swapped', 'the last of them', 'agreement %', 'distance', 'MACs', 'activations', 'ms')
        lines = table(columns, rows)
        count = len(self.front[-1].swapped)
        lines.append(
            f'{self.operation} on {self.model_name}: {count} blocks keep {100 * self.front[-1].agreement:.1f} % of '
            f'what the original says of {self.num_images} images, with {100 * self.tolerance:g} % to lose.'
        )
        return '\n'.join(lines)
