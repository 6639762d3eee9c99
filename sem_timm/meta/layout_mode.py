"""Layouts carried along beside a forward, in one pass on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from sem_timm.meta.layout import layout_of, set_layout
from sem_timm.meta.layout_rules import Step, inherited
from sem_timm.meta.shapes import in_place
from sem_timm.meta.vocabulary import Kind, word_named, writes_by_name


class LayoutMode(TorchFunctionMode):
    """Marks every tensor that derives from a marked one with its `Layout`, and finds common shapes without torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name == '__get__':  # an attribute: a transposed view has a layout, a shape or a type has none
            name = getattr(func.__self__, '__name__', '')
            word = word_named(name)
            if word is None or word.kind is not Kind.PERMUTATION:
                return func(*args, **kwargs)
        word = word_named(name)
        tensors = list(_tensors((*args, *kwargs.values())))
        out: Any = NotImplemented
        if word is not None and word.shape is not None and tensors and tensors[0].is_meta:
            out = in_place(*args, **kwargs) if writes_by_name(name) else word.shape(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        # What derives from weights alone has no layout, and so is told from data.
        sources = [tensor for tensor in tensors if layout_of(tensor) is not None]
        if sources:
            rule = inherited if word is None else word.layout
            outputs = [out] if isinstance(out, Tensor) else list(_tensors((out,)))
            for index, output in enumerate(outputs):
                set_layout(output, rule(Step(output, index, outputs, sources, args, kwargs)))
        return out


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
