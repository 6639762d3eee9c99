"""Which axis of a tensor holds the channels, and how many tokens in front are not image.

Sizes cannot tell (tokens may equal channels, height may equal both), so the layout is carried from operation to
operation: a convolution puts the channels on axis 1, a linear layer on the last one, permutations and reshapes move
them, concatenating learned tokens in front adds prefix tokens. `layout_rules` says how each operation moves a layout,
`layout_mode` carries it beside a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the channels of a tensor are.

    Attributes:
        channel: Index of the channel axis, or None where the channels are split or gone.
        prefix: Number of leading tokens (class, register, distillation) of a (B, N, C) tensor.
        batch: Index of the batch axis, with what else is folded into it, or None where it is folded into another.
    """

    channel: int | None = None
    prefix: int = 0
    batch: int | None = 0


def set_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """Marks a tensor with its layout, and so as data: as one that derives from the model's input."""
    tensor._layout = layout  # type: ignore[attr-defined]
    return tensor


def layout_of(value: Any) -> Layout | None:
    """The layout that `LayoutMode` found for a tensor; None for parameters and for what derives only from them."""
    return getattr(value, '_layout', None) if isinstance(value, Tensor) else None


def set_learned(tensor: Tensor) -> Tensor:
    """Marks a tensor as one that is computed from parameters and from no data."""
    tensor._learned = True  # type: ignore[attr-defined]
    return tensor


def is_learned(value: Any) -> bool:
    """Whether a value is a parameter, or a tensor that `LayoutMode` saw computed from parameters and from no data."""
    return isinstance(value, nn.Parameter) or getattr(value, '_learned', False)
