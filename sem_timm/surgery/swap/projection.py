"""Some rows of packed projections: of a linear layer or convolution, or of one with the batch norm behind it.

The module stays what it is. The swapped forward hands it to `projected_rows`, which computes some rows of its weights
as long as it is what was seen when the swap was planned, and else calls it and takes these rows of its output:
somebody may have registered hooks, put adapters or quantised layers in its place, quantised its weights, converted the
norm for distributed training, or fused the two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from sem_timm.errors import TraceError
from sem_timm.surgery.graphs import operation_name
from sem_timm.surgery.skeleton import Call, filled
from sem_timm.surgery.swap.rows import Rows
from sem_timm.surgery.trace import trace


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer or convolution whose output channels do not depend on each other."""
    is_conv = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == 'zeros'
    return type(module) is nn.Linear or is_conv


def projected_rows(
    x: Tensor, module: nn.Module, *, axis: int = -1, first: int = 0, last: int, period: int, form: str | None = None
) -> Tensor:
    """Some rows of the output of a projection; no others are computed, or counted by its norm.

    Args:
        x: The input.
        module: The projection, with its norm if it has one, or what has taken its place.
        axis: The axis of the output that holds the rows.
        first: The first row of every ``period``.
        last: The row behind the last one.
        period: How many rows make one repetition.
        form: Full name of the class whose forward is known to be a projection and a batch norm.
    """
    rows = first, last, period
    if is_plain(module) and not _is_altered(module):
        return _project(module, x, rows)
    layers = layers_of(module)
    if layers is None or name_of(module) != form or any(map(_is_altered, (module, *layers))):
        out: Tensor = module(x)
        return _take(out, axis, rows)
    projection, norm = layers
    out = _project(projection, x, rows)
    if type(norm) is nn.BatchNorm2d:
        return _normalize(norm, out, rows)
    return _normalize(norm, out.flatten(0, -2), rows).view_as(out)


def rows_of_weights(module: nn.Module, first: int, last: int, period: int) -> tuple[Tensor, Tensor | None] | None:
    """Some rows of the weight and the bias of a linear layer; None unless it is a plain one with one range of rows."""
    if type(module) is not nn.Linear or _is_altered(module) or period != module.out_features:
        return None
    return module.weight[first:last], None if module.bias is None else module.bias[first:last]


def layers_of(module: nn.Module | None) -> tuple[nn.Module, nn.Module] | None:
    """The two children of a module that may be a projection with a batch norm and nothing else."""
    children = () if module is None else tuple(module._modules.values())
    if len(children) != 2:
        return None
    projection, norm = children
    if projection is None or norm is None or not is_plain(projection):
        return None
    fits = type(norm) is (nn.BatchNorm1d if type(projection) is nn.Linear else nn.BatchNorm2d)
    return (projection, norm) if fits and norm.track_running_stats and norm.momentum is not None else None


def name_of(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f'{type(module).__module__}.{type(module).__qualname__}'


def is_normed_projection(module: nn.Module, given: Tensor, axis: int, rows: Rows) -> bool:
    """Whether some rows of a module of a weightless copy can be computed by themselves, in both modes.

    Its forward must consist of its two layers and of what only moves data, and agree with `projected_rows` in numbers.

    Args:
        module: The module.
        given: Its input, on the meta device.
        axis: The axis of its output that holds the rows.
        rows: The rows.
    """
    try:
        found = trace(module, Call((given,), {}, None))
    except TraceError:
        return False
    names, nodes = list(module._modules), list(found.graphs[False].nodes)
    called = [str(node.target) for node in nodes if node.op == 'call_module']
    others = {operation_name(node) for node in nodes if node.op in ('call_method', 'call_function')}
    plain = called == names and others <= _MOVES and not any(node.op == 'get_attr' for node in nodes)
    return (
        plain and found.graphs[True] is found.graphs[False] and not found.guards and _agrees(module, given, axis, rows)
    )


_MOVES = {'flatten', 'unflatten', 'view', 'view_as', 'reshape', 'reshape_as', 'permute', 'transpose', 'contiguous'}
_MOVES |= {'size', 'getattr', 'getitem'}

_Taken = tuple[int, int, int]


def _agrees(module: nn.Module, given: Tensor, axis: int, rows: Rows) -> bool:
    numbers = torch.Generator().manual_seed(0)
    whole = filled(module, numbers).float()
    part = copy.deepcopy(whole)
    inputs = torch.randn(given.shape, generator=numbers)
    taken = rows.first, rows.last, rows.period
    options: dict[str, Any] = dict(zip(('first', 'last', 'period'), taken))
    try:
        for training in (False, True):
            with torch.no_grad():
                expected = _take(whole.train(training)(inputs), axis, taken)
                result = projected_rows(inputs, part.train(training), form=name_of(module), axis=axis, **options)
            if result.shape != expected.shape or not torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
                return False
    except Exception:  # such as one that cannot be trained on so few numbers
        return False
    statistics = zip(_statistics(whole, taken), _statistics(part, taken))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in statistics)


def _statistics(module: nn.Module, rows: _Taken) -> Iterator[Tensor]:
    for buffer in module.buffers():
        yield _take(buffer, 0, rows) if buffer.ndim else buffer


# Weights of any other type, quantised ones say, may know a projection as a whole and no rows of it. An export shows
# plain weights as fake ones.
_PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor, type(None))


def _is_altered(module: nn.Module) -> bool:
    """Whether something was put around the forward of a module or into its weights, which only calling it honours."""
    hooks: Any = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(len(registered) > 0 for registered in hooks) or 'forward' in module.__dict__:
        return True
    return any(type(parameter) not in _PLAIN_WEIGHTS for parameter in module._parameters.values())


def _take(tensor: Tensor, axis: int, rows: _Taken) -> Tensor:
    first, last, period = rows
    axis %= tensor.ndim
    return tensor.unflatten(axis, (-1, period)).narrow(axis + 1, first, last - first).flatten(axis, axis + 1)


def _take_or_none(tensor: Tensor | None, rows: _Taken) -> Tensor | None:
    return None if tensor is None else _take(tensor, 0, rows)


def _project(projection: Any, x: Tensor, rows: _Taken) -> Tensor:
    weight, bias = _take(projection.weight, 0, rows), _take_or_none(projection.bias, rows)
    if type(projection) is nn.Linear:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, projection.stride, projection.padding, projection.dilation)


def _normalize(norm: Any, x: Tensor, rows: _Taken) -> Tensor:
    """What a batch norm does, on some of its channels; in training only their running statistics move on."""
    weight, bias = _take_or_none(norm.weight, rows), _take_or_none(norm.bias, rows)
    mean, variance = _take(norm.running_mean, 0, rows), _take(norm.running_var, 0, rows)
    if not norm.training:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)
    norm.num_batches_tracked.add_(1)
    # Copies, which the gradients may still need when another batch has moved the statistics on.
    mean, variance = mean.clone(), variance.clone()
    out = F.batch_norm(x, mean, variance, weight, bias, True, norm.momentum, norm.eps)
    first, last, period = rows
    for statistic, moved in ((norm.running_mean, mean), (norm.running_var, variance)):
        groups = statistic.unflatten(0, (-1, period)).narrow(1, first, last - first)
        groups.copy_(moved.view(groups.shape))
    return out
