"""A gate that is a constant, and the same in the weights: both, to be compared in numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.surgery import FactorPlace, Multiplied

# Of the largest number that comes out: what differs by rounding. A wrong place differs by as much as the factors do.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 3e-2


class Constant(nn.Module):
    """Multiplies each channel by a number of its own; called as a gate is."""

    def __init__(self, factor: Tensor, channel_dim: int) -> None:
        super().__init__()
        self.register_buffer('factor', factor)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
        """The product, and its sum with the shortcut if there is one."""
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        out = x * self.get_buffer('factor').to(x.dtype).view(shape)
        if shortcut is None:
            return out
        return shortcut + out if shortcut_first else out + shortcut


def multiplied(parameter: Tensor, factor: Tensor, place: Multiplied) -> Tensor:
    """A parameter with a factor (C,) in it, in its own type; the same numbers where the factor is one."""
    shape = [1] * parameter.ndim
    shape[place.axis] = -1
    part = factor[place.start : place.stop].view(shape)
    return (parameter.detach().cpu().double() * part).to(parameter.device, parameter.dtype)


def multiply(model: nn.Module, factor: Tensor, places: Sequence[Multiplied], below: str = '') -> None:
    """Puts new parameters with a factor in them into a model, or into the part of one with the name ``below``."""
    for place in places:
        path, _, key = place.name.removeprefix(f'{below}.' if below else '').rpartition('.')
        owner = model.get_submodule(path)
        owner._parameters[key] = nn.Parameter(multiplied(owner.get_parameter(key), factor, place), False)


def holder(place: FactorPlace) -> str:
    """The smallest module that holds a patched module and the layers that take its factor."""
    paths = [place.module.split('.'), *(parameter.name.split('.')[:-1] for parameter in place.parameters)]
    same = 0
    while all(len(path) > same for path in paths) and len({path[same] for path in paths}) == 1:
        same += 1
    return '.'.join(paths[0][:same])


def difference(model: nn.Module, place: FactorPlace, call: tuple[Any, Any], channel_dim: int, channels: int) -> str:
    """Compares a gate that is some constant with the same constant in the weights, on a call of the module around.

    The constant is drawn anew between 0.5 and 1.5, whatever the gate is, and the arithmetic is float64 where the
    module runs in it.

    Args:
        model: The model, which is not touched.
        place: Where the constant is to go.
        call: What the smallest module around gate and layers was given, by place and by name.
        channel_dim: Axis of the channels.
        channels: Number of channels.

    Returns:
        What differs; empty if nothing does.
    """
    name = holder(place)
    drawn = torch.rand(channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    outputs: list[list[Tensor]] = []
    for dtype in (torch.float64, None):
        try:
            outputs = [
                _run(model.get_submodule(name), name, place, call, dtype, drawn, channel_dim, in_weights)
                for in_weights in (False, True)
            ]
            break
        except (RuntimeError, TypeError, ValueError) as error:  # some forwards make tensors of one type
            if dtype is None:
                return f'it could not be tried: {str(error).splitlines()[0]}'
    expected, given = outputs
    for one, other in zip(expected, given):
        if one.shape != other.shape:
            return 'the weights do not take it: the shapes are others'
        tolerance = _TOLERANCES.get(one.dtype, _COARSE)
        largest = float(one.abs().max()) if one.numel() else 0.0
        if float((one - other).abs().max() if one.numel() else 0.0) > tolerance * max(largest, 1e-30):
            return f'in the weights of {", ".join(place.layers)} it gives other numbers'
    return ''


@torch.no_grad()
def _run(
    module: nn.Module,
    name: str,
    place: FactorPlace,
    call: tuple[Any, Any],
    dtype: torch.dtype | None,
    drawn: Tensor,
    channel_dim: int,
    in_weights: bool,
) -> list[Tensor]:
    twin = copy.deepcopy(module).cpu()
    twin = twin if dtype is None else twin.to(dtype)
    if in_weights:
        multiply(twin, drawn, place.parameters, name)
    block = twin.get_submodule(place.module[len(name) :].lstrip('.'))
    block._modules[place.attribute] = Constant(torch.ones_like(drawn) if in_weights else drawn, channel_dim)

    def converted(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu().clone()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(Tensor, converted, call)
    found = tree_leaves(twin(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]
