"""Some rows of packed projections: of a linear layer or convolution whose other rows nobody reads.

The module stays what it is. The swapped forward hands it to `projected_rows`, which computes some rows of its weights
as long as it is what was seen when the swap was planned, and else calls it and takes these rows of its output:
somebody may have registered hooks, put adapters or quantised layers in its place, or quantised its weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer or convolution whose output channels do not depend on each other."""
    is_conv = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == 'zeros'
    return type(module) is nn.Linear or is_conv


def projected_rows(x: Tensor, module: nn.Module, *, axis: int = -1, first: int = 0, last: int, period: int) -> Tensor:
    """Some rows of the output of a projection; no others are computed.

    Args:
        x: The input.
        module: The projection, or what has taken its place.
        axis: The axis of the output that holds the rows.
        first: The first row of every ``period``.
        last: The row behind the last one.
        period: How many rows make one repetition.
    """
    if not is_plain(module) or _is_altered(module):
        return _take(module(x), axis, first, last, period)
    projection: Any = module
    weight = _take(projection.weight, 0, first, last, period)
    bias = None if projection.bias is None else _take(projection.bias, 0, first, last, period)
    if type(projection) is nn.Linear:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, projection.stride, projection.padding, projection.dilation)


def rows_of_weights(module: nn.Module, first: int, last: int, period: int) -> tuple[Tensor, Tensor | None] | None:
    """Some rows of the weight and the bias of a linear layer; None unless it is a plain one with one range of rows."""
    if type(module) is not nn.Linear or _is_altered(module) or period != module.out_features:
        return None
    return module.weight[first:last], None if module.bias is None else module.bias[first:last]


# Weights of any other type, quantised ones say, may know a projection as a whole and no rows of it. An export shows
# plain weights as fake ones.
_PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor, type(None))


def _is_altered(module: nn.Module) -> bool:
    """Whether something was put around the forward of a module or into its weights, which only calling it honours."""
    hooks: Any = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(len(registered) > 0 for registered in hooks) or 'forward' in module.__dict__:
        return True
    return any(type(parameter) not in _PLAIN_WEIGHTS for parameter in module._parameters.values())


def _take(tensor: Tensor, axis: int, first: int, last: int, period: int) -> Tensor:
    """Of every ``period`` rows along an axis those from ``first`` to before ``last``."""
    axis %= tensor.ndim
    return tensor.unflatten(axis, (-1, period)).narrow(axis + 1, first, last - first).flatten(axis, axis + 1)
