"""How operations move the layout of what they are given: one rule for each way, named by the vocabulary.

For example ``x.permute(0, 2, 1)`` of tokens (B, N, C), whose layout is channel 2 and batch 0, gives channel 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from sem_timm.meta.layout import Layout, layout_of


@dataclass(frozen=True)
class Step:
    """One call of an operation, seen from one of the tensors that it returned.

    Attributes:
        out: The tensor whose layout is asked for.
        index: Which of ``outputs`` it is.
        outputs: All tensors that were returned.
        sources: Those of the tensors given that derive from the model's input, in their order.
        args: All that was given by place.
        kwargs: All that was given by name.
    """

    out: Tensor
    index: int
    outputs: list[Tensor]
    sources: list[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def source(self) -> Tensor:
        """The first of the sources."""
        return self.sources[0]

    def given(self, place: int, *names: str, default: Any = None) -> Any:
        """An argument by its place, or by one of its names."""
        named = next((self.kwargs[name] for name in names if name in self.kwargs), default)
        return self.args[place] if len(self.args) > place else named


Rule = Callable[[Step], Layout]


def _of(tensor: Tensor) -> Layout:
    return layout_of(tensor) or Layout()


def inherited(step: Step) -> Layout:
    """The layout of the input that looks most like the output: same shape before same number of axes."""
    out = step.out
    # x + bias inherits from x; a pooled map, whose sizes are others, from the map.
    alike = [source for source in step.sources if source.shape == out.shape]
    alike += [source for source in step.sources if source.ndim == out.ndim and source.shape != out.shape]
    layouts = [_of(source) for source in alike]
    channel = next((layout.channel for layout in layouts if layout.channel is not None), None)
    same_tokens = [_of(s).prefix for s in alike if s.ndim == 3 and s.shape[1] == out.shape[1]]
    return Layout(channel, max(same_tokens, default=0), layouts[0].batch if layouts else 0)


def unknown(step: Step) -> Layout:
    """Where the channels went is not known."""
    return Layout()


def on_axis_one(step: Step) -> Layout:
    """Convolutions and the norms that belong to them."""
    return Layout(1)


def on_last_axis(step: Step) -> Layout:
    """Linear layers."""
    source, out = step.source, step.out
    # A linear layer over tokens of another number, as mixers have it, leaves no token where it was.
    same_tokens = source.ndim == 3 and out.ndim == 3 and source.shape[1] == out.shape[1]
    batch = _of(source).batch if source.ndim == out.ndim else 0
    return Layout(out.ndim - 1, _of(source).prefix if same_tokens else 0, batch)


def of_layer_norm(step: Step) -> Layout:
    """A norm over the last axis says that it holds channels; one over several says nothing."""
    shape = step.given(1, 'normalized_shape', default=())
    return on_last_axis(step) if isinstance(shape, int) or len(shape) == 1 else inherited(step)


def permuted_by(order_of: Callable[..., list[int]]) -> Rule:
    """The rule of an operation that puts axes in another order, which ``order_of(ndim, args, kwargs)`` tells."""

    def permuted(step: Step) -> Layout:
        layout, order = _of(step.source), order_of(step.source.ndim, step.args, step.kwargs)
        channel, batch = (None if axis is None else order.index(axis) for axis in (layout.channel, layout.batch))
        # Tokens that are transposed keep their prefix: mixers transpose back before the tokens are used again.
        return Layout(channel, layout.prefix if step.source.ndim == 3 and 0 in order[:1] else 0, batch)

    return permuted


def reshaped(step: Step) -> Layout:
    """An axis survives a reshape where the new shape has an axis of its size behind the same number of elements."""
    source, out, layout = step.source, step.out, _of(step.source)
    if source.shape == out.shape:
        return layout
    batch = _same_axis(source, out, layout.batch)
    if layout.batch == 0 and out.ndim and out.shape[0] > 1 and _divides(source.shape[0], out.shape[0]):
        batch = 0  # windows, heads or tokens folded into the batch, or unfolded from it
    return Layout(_same_axis(source, out, layout.channel), 0, batch)


def _divides(one: int, other: int) -> bool:
    return one > 0 and (one % other == 0 or other % one == 0)


def _same_axis(source: Tensor, out: Tensor, axis: int | None) -> int | None:
    if axis is None or not source.numel():
        return None
    size, inner = source.shape[axis], prod(source.shape[axis + 1 :])
    return next((d for d in range(out.ndim) if out.shape[d] == size and prod(out.shape[d + 1 :]) == inner), None)


def multiplied(step: Step) -> Layout:
    """A matrix product keeps the rows of its left factor; its columns are channels where those of the left were."""
    # Attention times values, (B, h, N, M) @ (B, h, M, d), has channels last; weights times tokens keep theirs in place.
    given = [*step.args, *(step.kwargs[key] for key in ('input', 'other', 'mat2') if key in step.kwargs)]
    first, second = given[:2]
    out, left, right = step.out, layout_of(first), layout_of(second)
    batch = left.batch if left is not None and first.ndim == out.ndim else 0
    if left is not None and (right is None or right.channel == second.ndim - 1):
        return Layout(out.ndim - 1, 0, batch)
    if left is not None and left.channel is not None and left.channel == first.ndim - 2:
        return Layout(out.ndim - 2, 0, batch)
    return Layout(None, 0, batch)


def concatenated(step: Step) -> Layout:
    """Learned tokens in front of those of the image become prefix tokens."""
    out = step.out
    parts = _tensors(step.given(0, 'tensors', default=()))
    axis = step.given(1, 'dim', 'axis', default=0)
    channel = next((_of(part).channel for part in step.sources if _of(part).channel is not None), None)
    batch = _of(step.source).batch
    if out.ndim != 3 or axis % 3 != 1 or channel == 1:
        prefix = max((_of(part).prefix for part in step.sources), default=0) if out.ndim == 3 else 0
        return Layout(channel, prefix, batch)
    prefix = 0
    for part in parts:  # learned tokens, and tokens that were a prefix before, until the first image tokens
        own = part.shape[1] if layout_of(part) is None else _of(part).prefix
        prefix += own
        if own < part.shape[1]:
            break
    return Layout(channel, prefix, batch)


def _tensors(parts: Iterable[Any]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]


def indexed(step: Step) -> Layout:
    """``x[:, 1:]`` keeps axes and drops a token; ``x[:, 0]`` drops the axis of the tokens."""
    source, out, layout = step.source, step.out, _of(step.source)
    if source is not step.args[0]:
        return Layout()
    entries = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    # By a tensor of indices, tokens may come in any order.
    if any(isinstance(entry, (Tensor, list)) for entry in entries):
        return layout if out.ndim == source.ndim else Layout()
    axis, position, prefix = 0, 0, layout.prefix
    channel: int | None = None
    batch: int | None = None
    for entry in _entry_of_each_axis(entries, source.ndim):
        if entry is None:
            position += 1
            continue
        if axis == 1 and source.ndim == 3:
            prefix = _sliced_prefix(entry, source.shape[1], layout.prefix)
        if isinstance(entry, slice):
            channel = position if axis == layout.channel else channel
            batch = position if axis == layout.batch else batch
            position += 1
        axis += 1
    return Layout(channel, prefix if out.ndim == 3 else 0, batch)


def _entry_of_each_axis(entries: tuple[Any, ...], ndim: int) -> list[Any]:
    """Entries of an index with an ellipsis spelled out, and slices for the axes that it does not name."""
    missing = ndim - sum(entry is not None and entry is not Ellipsis for entry in entries)
    full: list[Any] = []
    for entry in entries:
        full += [slice(None)] * missing if entry is Ellipsis else [entry]
    return full + [slice(None)] * (ndim - sum(entry is not None for entry in full))


def _sliced_prefix(entry: Any, size: int, prefix: int) -> int:
    return sum(token < prefix for token in range(size)[entry]) if isinstance(entry, slice) else 0


def split(step: Step) -> Layout:
    """Pieces of tokens hold as many prefix tokens as are left when those before them have taken theirs."""
    source, layout = step.source, _of(step.source)
    axis = step.given(2, 'dim', default=0) % source.ndim
    if source.ndim != 3 or axis != 1:
        return layout
    start = sum(part.shape[1] for part in step.outputs[: step.index])
    return Layout(layout.channel, min(max(layout.prefix - start, 0), step.out.shape[1]), layout.batch)


def unbound(step: Step) -> Layout:
    """One axis less."""
    source, layout = step.source, _of(step.source)
    gone = step.given(1, 'dim', default=0) % source.ndim
    channel, batch = (None if axis in (None, gone) else axis - (gone < axis) for axis in (layout.channel, layout.batch))
    return Layout(channel, 0, batch)


def stacked(step: Step) -> Layout:
    """One axis more."""
    layout = _of(step.source)
    new = step.given(1, 'dim', default=0) % step.out.ndim
    channel, batch = (None if axis is None else axis + (new <= axis) for axis in (layout.channel, layout.batch))
    return Layout(channel, 0, batch)
