"""Some rows of packed projections: of a linear layer or convolution whose other rows nobody reads.

The module stays what it is. The swapped forward hands it to `projected_rows`, which computes some rows of its weights
as long as it is what was seen when the swap was planned, and else calls it and takes these rows of its output:
somebody may have registered hooks, put adapters or quantised layers in its place, or quantised its weights.
"""

from __future__ import annotations

from typing import TypeGuard, cast

from torch import Tensor, fx, nn
from torch.nn import functional as F

from sem_timm.plain import is_plain


def divides(module: nn.Module | None) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a module is a plain linear layer or convolution whose output channels do not depend on each other."""
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != 'zeros'):
        return False
    return is_plain(module, nn.Linear, nn.Conv2d)


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
    if isinstance(x, fx.Proxy):  # which rows are taken is decided by what the module is when the trace runs
        rows = dict(axis=axis, first=first, last=last, period=period)
        return cast(Tensor, x.tracer.create_proxy('call_function', projected_rows, (x, module), rows))
    if not divides(module):
        return _take(module(x), axis, first, last, period)
    weight = _take(module.weight, 0, first, last, period)
    bias = None if module.bias is None else _take(module.bias, 0, first, last, period)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)


def rows_of_weights(module: nn.Module, first: int, last: int, period: int) -> tuple[Tensor, Tensor | None] | None:
    """Some rows of the weight and the bias of a linear layer; None unless it is a plain one with one range of rows."""
    if not is_plain(module, nn.Linear) or period != module.out_features:
        return None
    return module.weight[first:last], None if module.bias is None else module.bias[first:last]


def _take(tensor: Tensor, axis: int, first: int, last: int, period: int) -> Tensor:
    """Of every ``period`` rows along an axis those from ``first`` to before ``last``."""
    axis %= tensor.ndim
    if period == tensor.shape[axis]:
        return tensor.narrow(axis, first, last - first)
    return tensor.unflatten(axis, (-1, period)).narrow(axis + 1, first, last - first).flatten(axis, axis + 1)
