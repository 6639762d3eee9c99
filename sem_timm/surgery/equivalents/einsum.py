"""Products written with ``einsum``, as products of matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def einsum(equation: Any, *operands: Any) -> Any:
    """``torch.einsum``; for two operands with one axis of rows, of columns and to sum over each, as ``@``.

    For example 'bhid,bhjd->bhij' is ``q @ k.transpose(-2, -1)``. Of other equations it knows none.
    """
    if not isinstance(equation, str) or '->' not in equation or len(operands) != 2:
        return NotImplemented
    # An ellipsis is one more axis, as long as it stays in front.
    inputs, _, output = equation.replace(' ', '').replace('...', '.').partition('->')
    first, _, second = inputs.partition(',')
    rows, columns, summed = _only(first, second, output), _only(second, first, output), _shared(first, second, output)
    batch = [axis for axis in first if axis in second and axis in output]
    repeated = any(len(set(axes)) < len(axes) for axes in (first, second, output))
    if repeated or not len(rows) == len(columns) == len(summed) == 1 or {*output} != {*batch, *rows, *columns}:
        return NotImplemented
    orders = [[*batch, *rows, *summed], [*batch, *summed, *columns], [*batch, *rows, *columns]]
    if any('.' in axes[1:] for axes in (first, second, output, *map(''.join, orders))):
        return NotImplemented
    left, right = _ordered(operands[0], first, orders[0]), _ordered(operands[1], second, orders[1])
    return _ordered(left @ right, ''.join(orders[2]), [*output])


def _only(axes: str, others: str, output: str) -> list[str]:
    return [axis for axis in axes if axis not in others and axis in output]


def _shared(first: str, second: str, output: str) -> list[str]:
    return [axis for axis in first if axis in second and axis not in output]


def _ordered(tensor: Tensor, axes: str, wanted: list[str]) -> Tensor:
    """A tensor with its axes in another order."""
    order = [axes.index(axis) for axis in wanted]
    if order == list(range(len(order))):
        return tensor
    swaps_last = order[:-2] == list(range(len(order) - 2))
    return tensor.transpose(-2, -1) if swaps_last else tensor.permute(order)
