"""Layouts carried along beside a forward, in one pass on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sem_timm.meta.layout import is_learned, layout_of, set_layout, set_learned
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
            out = _called(func, args, kwargs, tensors)
        # What derives from weights alone has no layout, and so is told from data.
        sources = [tensor for tensor in tensors if layout_of(tensor) is not None]
        outputs = [out] if isinstance(out, Tensor) else list(_tensors((out,)))
        if sources:
            rule = inherited if word is None else word.layout
            for index, output in enumerate(outputs):
                set_layout(output, rule(Step(output, index, outputs, sources, args, kwargs)))
        elif any(map(is_learned, tensors)) and (word is None or word.kind is not Kind.FILL):
            # What is fixed is told from what is learned: a mask from a position bias.
            for output in outputs:
                set_learned(output)
        return out


class AnsweringMode(LayoutMode):
    """Answers what a forward asks of numbers, which there are none of on the meta device, so that it runs to its end.

    Args:
        answer: What is said to questions of yes and no; numbers are one.

    Attributes:
        asked: Whether something was asked.
    """

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer, self.asked = answer, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, '__name__', '')
        if name not in ('item', '__bool__', '__int__', '__float__', '__index__') or not args[0].is_meta:
            return super().__torch_function__(func, types, args, kwargs)
        self.asked = True
        if name == '__bool__' or args[0].dtype is torch.bool:
            return self.answer
        return 1.0 if args[0].is_floating_point() else 1


def _called(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if len({tensor.is_meta for tensor in tensors}) < 2:
            raise
    # What a forward makes is on the CPU if it does not say where, as its inputs are when it is run.
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to('meta'), (args, kwargs))
    return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
