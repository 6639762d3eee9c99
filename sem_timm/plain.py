"""Whether a layer is no more than its class: then its weights may be read instead of calling it.

Somebody may have registered hooks, put an adapter or a quantised layer in its place, or replaced its weights by a
parametrisation. All that is honoured by calling a layer, and by nothing else.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

# Weights of any other type, quantised ones say, may know what to do as a whole only. An export shows plain weights as
# fake ones.
PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor)

Layer = TypeVar('Layer', bound=nn.Module)


def is_plain(layer: nn.Module | None, *kinds: type[Layer]) -> TypeGuard[Layer]:
    """Whether nothing is lost if a layer is not called: no hook, and no forward, weights or class of its own.

    Hooks of all modules of the process do not count: those who register them, profilers mostly, measure what is done.

    Args:
        layer: The layer.
        kinds: The classes it may be of; classes derived from them, as parametrisations make them, do not count.
    """
    if type(layer) not in kinds:
        return False
    known: Any = layer
    hooks = (known._forward_hooks, known._forward_pre_hooks, known._backward_hooks, known._backward_pre_hooks)
    if any(len(registered) > 0 for registered in hooks) or 'forward' in known.__dict__:
        return False
    return all(parameter is None or type(parameter) in PLAIN_TENSORS for parameter in known._parameters.values())
