"""What a plan is: sites and refusals of one operation in one model, to look at and to apply."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.surgery.rewrite import Edit

POSITIONS = ('auto', 'residual', 'output')
BRANCHES = ('last', 'all')


class Insertion(Protocol):
    """What the surgery asks of an operation: where it goes, and how to build the module that is put there."""

    @property
    def position(self) -> str:
        """One of `POSITIONS`."""

    @property
    def branches(self) -> str:
        """One of `BRANCHES`."""

    @property
    def attribute(self) -> str:
        """Name of the new child in its block."""

    @property
    def fuses_shortcut(self) -> bool:
        """Whether the module takes ``(branch, shortcut, shortcut_first=False)`` and returns their sum."""

    @property
    def is_identity(self) -> bool:
        """Whether the module, as built, returns its input bit for bit."""

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Builds the module for a site."""


@dataclass(frozen=True)
class Site:
    """One place where a module is inserted.

    Attributes:
        name: Name of the block in the model.
        class_name: Class of the block.
        position: 'residual', before a residual add, or 'output'.
        attribute: Name of the new child in the block.
        shape: Shape of the tensor there in the probe, batch of two.
        dtype: Its type.
        channels: Number of channels C.
        channel_dim: 1 or -1.
        num_prefix_tokens: Leading tokens that are not image.
        num_parameters: Parameters of the new module.
    """

    name: str
    class_name: str
    position: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels: int
    channel_dim: int
    num_prefix_tokens: int = 0
    num_parameters: int = 0

    @property
    def layout(self) -> str:
        """The layout by timm's names: NCHW, NHWC, NLC, …"""
        spatial = {1: 'L', 2: 'HW', 3: 'DHW'}.get(len(self.shape) - 2, '…')
        return f'NC{spatial}' if self.channel_dim == 1 else f'N{spatial}C'


@dataclass(frozen=True)
class Refusal:
    """A module that cannot take the operation, and why."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Sites of one operation in one model, ready to be applied.

    Prints as a table, iterates over its sites, and converts to plain data with `to_dict`.
    """

    operation: Insertion
    model_name: str
    input_size: tuple[int, ...]
    dtype: torch.dtype
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    edits: dict[str, Edit] = field(repr=False)
    model: weakref.ref[nn.Module] = field(repr=False)
    structure: dict[str, Hashable] = field(repr=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def num_parameters(self) -> int:
        """Parameters that applying the plan adds."""
        return sum(site.num_parameters for site in self.sites)

    def code(self, name: str) -> str:
        """Source of the forward that the block ``name`` will have."""
        if name not in self.edits:
            raise OptionError(f'{name!r} is not a site of this plan. It has: {", ".join(self.edits)}.')
        return self.edits[name].source

    def to_dict(self) -> dict[str, Any]:
        """The plan as data that `json.dumps` takes."""
        operation = self.operation
        return {
            'model': self.model_name,
            'operation': operation.to_dict() if hasattr(operation, 'to_dict') else repr(operation),
            'input_size': list(self.input_size),
            'identity': operation.is_identity,
            'num_parameters': self.num_parameters,
            'sites': [
                {**asdict(site), 'shape': list(site.shape), 'dtype': str(site.dtype), 'layout': site.layout}
                for site in self.sites
            ],
            'refusals': [asdict(refusal) for refusal in self.refusals],
        }

    def __repr__(self) -> str:
        rows = [('site', 'class', 'position', 'layout', 'channels', 'new parameters')]
        rows += [
            (s.name, s.class_name, s.position, s.layout, f'{s.channels:,}', f'{s.num_parameters:,}') for s in self.sites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            '  '.join(
                text.ljust(w) if i < 4 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, '  '.join('-' * width for width in widths))
        noun = 'site' if len(self) == 1 else 'sites'
        kept = 'the outputs stay bit for bit the same' if self.operation.is_identity else 'the outputs change'
        size = ' x '.join(map(str, self.input_size))
        lines.append(f'{self.operation} on {self.model_name} at {size}: {len(self)} {noun}, ')
        lines[-1] += f'{self.num_parameters:,} new parameters; {kept}.'
        if self.refusals:
            lines += ['Refused:', *(f'  {r.name} ({r.class_name}): {r.reason}' for r in self.refusals)]
        return '\n'.join(lines)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises OptionError if an option is not one of its choices."""
    if value not in choices:
        raise OptionError(f'{name}={value!r} is unknown. There are: {", ".join(map(repr, choices))}.')
