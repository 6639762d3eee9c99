"""A traced forward as lines of code, each with what it gives and where it stands."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sem_timm.errors import from_package
from sem_timm.meta import Layout, layout_of
from sem_timm.surgery import Reading, statements

# Layouts by timm's names: the number of axes and that of the channels.
_LAYOUTS = {(2, 1): 'NC', (3, 1): 'NCL', (3, 2): 'NLC', (4, 1): 'NCHW', (4, 3): 'NHWC', (5, 1): 'NCDHW'}


@dataclass(frozen=True)
class Line:
    """One line of a module's forward, as it was traced.

    Attributes:
        code: The statement; for an argument its name.
        value: What it gives: shape and layout of a tensor, where B is the batch.
        place: File and line in the model's own code; empty for arguments, and where it is torch's or in no file.
    """

    code: str
    value: str
    place: str = ''


class Listing:
    """The graph of a reading in eval mode, as it is written for people.

    Args:
        reading: The reading.
        batch_size: Number of images in the probe.
    """

    def __init__(self, reading: Reading, batch_size: int) -> None:
        self.values = reading.values[False]
        self.batch_size = batch_size
        nodes = list(reading.trace.graphs[False].nodes)
        self._written = dict(zip(nodes, statements(reading.trace.graphs[False])))

    @property
    def lines(self) -> tuple[Line, ...]:
        """One line for each argument and each statement."""
        return tuple(
            Line(self.code(node), described(self.values.get(node), self.batch_size), place_of(node))
            for node, (name, text) in self._written.items()
            if text or (node.op == 'placeholder' and name)
        )

    def code(self, node: fx.Node) -> str:
        """The statement of a node; the name of one that has none."""
        name, text = self._written[node]
        for functional in ('torch._C._nn.', 'torch.nn.functional.'):
            text = text.replace(functional, 'F.')
        return '; '.join(text.split('\n')) or name

    def name(self, node: Any) -> str:
        """How the value of a node is called, or a number written."""
        return self._written[node][0] if isinstance(node, fx.Node) else repr(node)


def place_of(node: fx.Node) -> str:
    """File and line that a node was traced from, as 'timm/models/vision_transformer.py:100'."""
    file, number = node.meta.get('place') or ('', 0)
    return f'{from_package(file)}:{number}' if file and not file.startswith('<') else ''  # a patched forward has none


def line_of(node: fx.Node) -> str:
    """The same with the line's code behind it."""
    place = place_of(node)
    return f'{place}: {linecache.getline(*node.meta["place"]).strip()}' if place else ''


def described(value: Any, batch_size: int) -> str:
    """A value in words: '(B, 64, 56, 56) NCHW' for a tensor."""
    if isinstance(value, Tensor):
        return _tensor(value, batch_size)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        entries = [described(entry, batch_size) for entry in value]
        if len(entries) > 1 and len(set(entries)) == 1:
            return f'{len(entries)} times {entries[0]}'
        return f'[{", ".join(entries)}]' if isinstance(value, list) else ', '.join(entries)
    if isinstance(value, (type(None), bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    return str(tuple(value)) if isinstance(value, torch.Size) else f'a {type(value).__name__}'


def _tensor(tensor: Tensor, batch_size: int) -> str:
    layout = layout_of(tensor)
    shape = [str(size) for size in tensor.shape]
    if layout is None:
        return f'({", ".join(shape)}) not computed from the input'
    if layout.batch is not None and layout.batch < tensor.ndim and tensor.shape[layout.batch] % batch_size == 0:
        folded = tensor.shape[layout.batch] // batch_size  # such as windows
        shape[layout.batch] = 'B' if folded == 1 else f'{folded}B'
    return f'({", ".join(shape)}) {_layout(layout, tensor.ndim)}'


def _layout(layout: Layout, ndim: int) -> str:
    named = _LAYOUTS.get((ndim, layout.channel if layout.channel is not None else -1)) if layout.batch == 0 else None
    if named is not None:
        prefix = {0: '', 1: ', 1 prefix token'}.get(layout.prefix, f', {layout.prefix} prefix tokens')
        return named + prefix
    channels = 'channels split or gone' if layout.channel is None else f'channels on axis {layout.channel}'
    where = {None: ', batch folded into another axis', 0: ''}.get(layout.batch, f', batch on axis {layout.batch}')
    return channels + where
