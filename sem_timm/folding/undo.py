"""A model as it was, after an error in the middle of a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def undone_on_error(model: nn.Module, changed: Iterable[Tensor]) -> Iterator[None]:
    """Gives modules their classes, children and attributes back, and tensors their numbers, if there is an error.

    Args:
        model: The model; its children may be taken out, and its attributes put and deleted.
        changed: The parameters and buffers whose numbers may change.
    """
    modules = [(module, type(module), dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    numbers = [(tensor, tensor.detach().clone()) for tensor in changed]
    try:
        yield
    except BaseException:
        for module, cls, attributes, children in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        for tensor, value in numbers:
            tensor.detach().copy_(value)
        raise
