"""What became of each gate: a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sem_timm.tables import table


@dataclass(frozen=True)
class GateFold:
    """One gate, or another child that a patch has put in, and what became of it.

    Attributes:
        module: Name of the patched module.
        attribute: Name of the child in it.
        channels: Number of channels; 0 for what is no gate.
        mean: Mean of the gate over images and channels, of 'ssf' that of the scale; None for what is no gate or was not
            run.
        explained: The part of the gate's variance that the image explains, between 0 and 1: its variance over the
            images, as a mean over channels, of its variance over images and channels. A gate that does not depend on
            the image has 0. Where a gate pools windows by themselves, each counts as an image here.
        loss: What the block loses if the gate is its mean: the norm of ``y * (g - mean)`` relative to that of
            ``y * g``, over all images, channels and positions, for the branch y and the gate g.
        folded: Whether the gate is now in the weights.
        layers: The layers that took its mean, or could.
        kind: What they are, such as 'batch norm'.
        reason: Why it was not folded; or of one that was, why the child is still there.
    """

    module: str
    attribute: str
    channels: int = 0
    mean: float | None = None
    explained: float | None = None
    loss: float | None = None
    folded: bool = False
    layers: tuple[str, ...] = ()
    kind: str = ''
    reason: str = ''

    @property
    def name(self) -> str:
        """The name of the child in the model."""
        return f'{self.module}.{self.attribute}' if self.module else self.attribute


@dataclass(frozen=True, repr=False)
class FoldResult:
    """What folding did to a model; prints as a table, converts to plain data with `to_dict`.

    Attributes:
        model_name: Class of the model.
        num_images: Number of images that the gates were measured on.
        gates: The gates, in the order of ``named_modules``, with whatever else patches have put in.
        is_plain: Whether no patch is left, so that the model needs no sem_timm.
        accuracy_before: Top-1 accuracy on the images with the gates, in percent; None without labels.
        accuracy_after: The same with what is left.
    """

    model_name: str
    num_images: int
    gates: tuple[GateFold, ...]
    is_plain: bool
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @property
    def num_folded(self) -> int:
        """How many gates are now in the weights."""
        return sum(gate.folded for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """The result as data that `json.dumps` takes."""
        gates = [{**asdict(gate), 'layers': list(gate.layers)} for gate in self.gates]
        return {**asdict(self), 'num_folded': self.num_folded, 'gates': gates}

    def __repr__(self) -> str:
        rows = [
            [gate.name, _into(gate), f'{gate.channels:,}' if gate.channels else '–', *_numbers(gate)]
            for gate in self.gates
        ]
        lines = table(['gate', 'folded into', 'channels', 'mean', 'by image', 'loss'], rows, left=2)
        lines.append(
            f'{self.model_name}, {self.num_images:,} images: {self.num_folded} of {len(self.gates)} folded. By image: '
            'the part of the variance that the image explains. Loss: relative error of the branch.'
        )
        if self.accuracy_before is not None and self.accuracy_after is not None:
            lines.append(f'Top-1 accuracy: {self.accuracy_before:.2f} % before, {self.accuracy_after:.2f} % after.')
        told = [f'  {gate.name}: {gate.reason}' for gate in self.gates if gate.reason]
        return '\n'.join([*lines, *(['Still there:', *told] if told else [])])


def _into(gate: GateFold) -> str:
    return f'{", ".join(gate.layers)} ({gate.kind})' if gate.folded else '–'


def _numbers(gate: GateFold) -> list[str]:
    numbers = (gate.mean, gate.explained, gate.loss)
    forms = ('{:.3f}', '{:.1%}', '{:.2%}')
    return ['–' if number is None else form.format(number) for number, form in zip(numbers, forms)]
