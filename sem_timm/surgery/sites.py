"""What surgery is told and what it finds: operations, the sites they can be done at, and refusals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

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
    def fidelity(self) -> str:
        """What a trained model was measured to keep of its skill without training; empty where it needs training."""

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
        num_windows: How many windows, or other groups, of each image the batch axis holds. Where it is more than one,
            the new module pools each of them by itself.
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
    num_windows: int = 1
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
        loses_terms: Whether position biases, or masks of windows, go with the old core.
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
    loses_terms: bool = False
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


class Refused(Exception):
    """A module cannot take the operation; the message is the reason, to be listed or raised by the caller."""
