"""What a plan is: sites and refusals of one operation in one model, to look at and to apply."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from sem_timm.errors import OptionError
from sem_timm.surgery.rewrite import Edit
from sem_timm.tables import table

if TYPE_CHECKING:
    from sem_timm.surgery.swap.original import Original
    from sem_timm.surgery.swap.rows import Rows

POSITIONS = ('auto', 'residual', 'output')
BRANCHES = ('last', 'all')


class Operation(Protocol):
    """What the surgery asks of every operation."""

    @property
    def attribute(self) -> str:
        """Name of the new child in its module."""

    @property
    def is_identity(self) -> bool:
        """Whether the outputs stay bit for bit what they were."""


class Insertion(Operation, Protocol):
    """What the surgery asks of an operation that inserts modules: where it goes, and how to build what is put there."""

    @property
    def position(self) -> str:
        """One of `POSITIONS`."""

    @property
    def branches(self) -> str:
        """One of `BRANCHES`."""

    @property
    def fuses_shortcut(self) -> bool:
        """Whether the module takes ``(branch, shortcut, shortcut_first=False)`` and returns their sum."""

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Builds the module for a site."""


class Swap(Operation, Protocol):
    """What the surgery asks of an operation that puts another attention core, or module, in place of the old."""

    @property
    def reads_keys(self) -> bool:
        """Whether the new core takes ``(q, k, v)``; otherwise ``(q)``. A mask may follow."""

    @property
    def folds_projection(self) -> bool:
        """Whether the new core has ``attend_folded(x, weight, bias)`` for queries that are a projection of ``x``."""

    @property
    def takes_pairwise_mask(self) -> bool:
        """Whether it honours a mask for pairs of tokens, beside one of tokens to leave out."""

    @property
    def replaces_module(self) -> bool:
        """Whether it takes the place of all that the attention module computes, not of its core alone."""

    def build(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Builds the new child for a site."""


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

    columns: ClassVar[tuple[str, ...]] = ('site', 'class', 'position', 'layout', 'channels', 'new parameters')

    def row(self) -> tuple[str, ...]:
        """The site as texts under `columns`."""
        counts = f'{self.channels:,}', f'{self.num_parameters:,}'
        return (self.name, self.class_name, self.position, self.layout, *counts)

    def to_dict(self) -> dict[str, Any]:
        """The site as data that `json.dumps` takes."""
        return {**asdict(self), 'shape': list(self.shape), 'dtype': str(self.dtype), 'layout': self.layout}

    @property
    def layout(self) -> str:
        """The layout by timm's names: NCHW, NHWC, NLC, …"""
        spatial = {1: 'L', 2: 'HW', 3: 'DHW'}.get(len(self.shape) - 2, '…')
        return f'NC{spatial}' if self.channel_dim == 1 else f'N{spatial}C'


@dataclass(frozen=True)
class AttentionSite:
    """One attention core, or attention module, that is replaced.

    Attributes:
        name: Name of the attention module in the model.
        class_name: Its class.
        attribute: Name of the new child in it.
        shape: Shape of the queries in the probe, (..., N, d), batch of two; of the module's input for a whole module.
        key_shape: Shape of the keys, (..., M, d).
        value_shape: Shape of the values, (..., M, d_v).
        dtype: Their type.
        num_heads: Heads with parameters of their own; 1 where they are folded into the batch and share theirs.
        head_axis: Axis of the heads in the queries, from the end.
        num_prefix_tokens: Leading tokens that are not image.
        grid_size: Height and width of the image tokens, where known.
        masked: Whether the core is handed the module's mask.
        num_parameters: Parameters of the new child.
    """

    name: str
    class_name: str
    attribute: str
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    num_heads: int = 1
    head_axis: int = -3
    num_prefix_tokens: int = 0
    grid_size: tuple[int, int] | None = None
    masked: bool = False
    num_parameters: int = 0

    columns: ClassVar[tuple[str, ...]] = ('site', 'class', 'queries', 'heads', 'tokens', 'new parameters')

    @property
    def position(self) -> str:
        """Where the new child acts."""
        return 'core'

    def row(self) -> tuple[str, ...]:
        """The site as texts under `columns`."""
        queries = ' x '.join(['B', *map(str, self.shape[1:])])
        counts = f'{self.num_heads}', f'{self.shape[-2]:,}', f'{self.num_parameters:,}'
        return (self.name, self.class_name, queries, *counts)

    def to_dict(self) -> dict[str, Any]:
        """The site as data that `json.dumps` takes."""
        return {**asdict(self), 'position': self.position, 'dtype': str(self.dtype)}


@dataclass(frozen=True)
class Refusal:
    """A module that cannot take the operation, and why.

    Attributes:
        name: Name of the module in the model.
        class_name: Its class.
        reason: Why it cannot.
    """

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Sites of one operation in one model, ready to be applied.

    Prints as a table, iterates over its sites, and converts to plain data with `to_dict`.

    Attributes:
        operation: The configuration of the operation.
        model_name: Class of the model.
        input_size: Shape (C, H, W) of the probe.
        dtype: Type of the model.
        sites: The sites, in the order of ``named_modules``.
        refusals: Modules that cannot take the operation, with reasons.
        edits: The edit of each module, by name.
        model: The model.
        structure: Classes and shapes of the model when the plan was made.
        unread: Names of parameters that no longer reach the output; they stop requiring gradients.
        sliced: The rows that are read of each packed weight that is not read as a whole; the others get gradients of
            zero.
        computed: Names of modules that are still called though nobody reads their result, or all of it.
        originals: What the old attention of each module is computed by.
    """

    operation: Insertion | Swap
    model_name: str
    input_size: tuple[int, ...]
    dtype: torch.dtype
    sites: tuple[Site | AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    edits: dict[str, Edit] = field(repr=False)
    model: weakref.ref[nn.Module] = field(repr=False)
    structure: dict[str, Hashable] = field(repr=False)
    unread: tuple[str, ...] = ()
    sliced: dict[str, Rows] = field(default_factory=dict)
    computed: tuple[str, ...] = ()
    originals: dict[str, Original] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def num_parameters(self) -> int:
        """Parameters that applying the plan adds."""
        return sum(site.num_parameters for site in self.sites)

    @property
    def swaps_attention(self) -> bool:
        """Whether the plan puts another attention in place of the old, so that the model needs training."""
        return isinstance(self.sites[0], AttentionSite)

    def code(self, name: str) -> str:
        """Source of the forward that the block ``name`` will have.

        Raises:
            OptionError: If the plan has no such site.
        """
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
            'sites': [site.to_dict() for site in self.sites],
            'unread': list(self.unread),
            'sliced': {name: asdict(rows) for name, rows in self.sliced.items()},
            'computed': list(self.computed),
            'refusals': [asdict(refusal) for refusal in self.refusals],
        }

    def __repr__(self) -> str:
        columns = self.sites[0].columns
        rows = [site.row() for site in self.sites]
        lines = table(columns, rows, left=len(columns) - sum(name in _NUMBERS for name in columns))
        noun = 'site' if len(self) == 1 else 'sites'
        kept = 'the outputs stay bit for bit the same' if self.operation.is_identity else 'the outputs change'
        if self.swaps_attention:
            kept = 'the outputs change, and the model needs training'
        size = ' x '.join(map(str, self.input_size))
        lines.append(f'{self.operation} on {self.model_name} at {size}: {len(self)} {noun}, ')
        lines[-1] += f'{self.num_parameters:,} new parameters; {kept}.'
        if self.unread:
            lines.append(f'No longer read: {len(self.unread)} parameters, which stop requiring gradients.')
        if self.computed:
            lines.append(f'Still computed, in whole or in part for nobody: {_few(self.computed)}.')
        if self.refusals:
            lines += ['Refused:', *(f'  {r.name} ({r.class_name}): {r.reason}' for r in self.refusals)]
        return '\n'.join(lines)


def _few(names: tuple[str, ...]) -> str:
    """Some names and how many more there are."""
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(names[:3]) + more


_NUMBERS = ('channels', 'heads', 'tokens', 'new parameters')
