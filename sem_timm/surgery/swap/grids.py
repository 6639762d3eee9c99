"""Height and width of the grid that the tokens of an attention module form, where something says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from sem_timm.meta.layout import layout_of
from sem_timm.surgery.reading import Reader

_Size = tuple[int, int]

# Attributes in which modules keep the grid they are made for, or the side of a square window.
_NAMES = ('window_size', 'ws', 'grid_size', 'feat_size', 'resolution')


class Grids:
    """Looks for grids in what a probed model computed: a number of tokens alone does not tell height from width.

    Args:
        reader: The reader of the model.
        attending: Names of attention modules, whose insides hold pairs of tokens and heads, not images.
    """

    def __init__(self, reader: Reader, attending: Iterable[str]) -> None:
        self.reader = reader
        self._inside = tuple(f'{name}.' for name in attending)
        self._maps: list[tuple[str, list[_Size]]] = []
        for name, call in reader.probe.calls.items():  # in the order in which modules returned
            if not name.startswith(self._inside):
                self._maps.append((name, [*_sizes((call.args, call.kwargs)), *_sizes(call.output)]))

    def find(self, name: str, arguments: Any, tokens: int) -> _Size | None:
        """The grid of so many tokens in a module: as it is told, as it is made for, as the last map, as patches are."""
        for size in self._known(name, arguments):
            if size[0] * size[1] == tokens:
                return size
        return None

    def _known(self, name: str, arguments: Any) -> Iterator[_Size]:
        for value in arguments.values():
            yield from _pairs(value)
            yield from _sizes(value)
        for module in self.reader.modules[name].modules():
            for value in (module.__dict__.get(attribute) for attribute in _NAMES):
                yield from [(value, value)] if type(value) is int else _pairs(value)
        parent = name
        while parent:
            parent = parent.rpartition('.')[0]
            call = self.reader.probe.calls.get(parent)
            yield from () if call is None or not parent else _sizes((call.args, call.kwargs))
        returned = [other for other, _ in self._maps]
        before = returned.index(name) if name in returned else len(returned)
        for _, sizes in reversed(self._maps[:before]):
            yield from reversed(sizes)
        for module in self.reader.modules.values():
            yield from _pairs(module.__dict__.get('grid_size'))


def _pairs(value: Any) -> Iterator[_Size]:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(size) is int for size in value):
        yield value[0], value[1]


def _sizes(value: Any) -> list[_Size]:
    """Height and width of the maps (B, C, H, W) or (B, H, W, C) in a value."""
    sizes = []
    for leaf in tree_leaves(value):
        layout = layout_of(leaf)
        if isinstance(leaf, Tensor) and leaf.ndim == 4 and layout is not None and layout.channel in (1, 3):
            height, width = leaf.shape[2:] if layout.channel == 1 else leaf.shape[1:3]
            if height > 1 and width > 1:  # else these may be the tokens of one window
                sizes.append((int(height), int(width)))
    return sizes
