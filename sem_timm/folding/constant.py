"""A gate that is a constant, or a scale and shift, and the same in the weights: both, to be compared in numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.surgery import FactorPlace, Multiplied

# Of the largest number that comes out: what differs by rounding. A wrong place differs by as much as the factors do.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 3e-2


@dataclass(frozen=True)
class Constant:
    """What is done to each channel, whatever the image.

    Attributes:
        factor: (C,), in float64 on the CPU.
        shift: The same, added to the product; None for a gate.
    """

    factor: Tensor
    shift: Tensor | None = None

    def folded(self, parameter: Tensor, place: FactorPlace, entry: Multiplied) -> Tensor:
        """A parameter of a place with this in it, in its own type; the same numbers for factors of one alone."""
        shape = [1] * parameter.ndim
        shape[entry.axis] = -1
        part = slice(entry.start, entry.stop)
        value = parameter.detach().cpu().double() * self.factor[part].view(shape)
        if self.shift is not None and entry in place.biases:
            value = value + self.shift[part].view(shape)
        return value.to(parameter.device, parameter.dtype)

    def put(self, model: nn.Module, place: FactorPlace, below: str = '') -> None:
        """Puts new parameters with this in them into a model, or into the part of one with the name ``below``."""
        for entry in place.parameters:
            path, _, key = entry.name.removeprefix(f'{below}.' if below else '').rpartition('.')
            owner = model.get_submodule(path)
            owner._parameters[key] = nn.Parameter(self.folded(owner.get_parameter(key), place, entry), False)


class Constantly(nn.Module):
    """Does the same to each image; called as a gate is."""

    def __init__(self, constant: Constant, channel_dim: int) -> None:
        super().__init__()
        self.constant, self.channel_dim = constant, channel_dim

    def forward(self, x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
        """The product, plus the shift, and its sum with the shortcut if there is one."""
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        factor, shift = self.constant.factor, self.constant.shift
        out = x * factor.to(x.device, x.dtype).view(shape)
        if shift is not None:
            out = out + shift.to(x.device, x.dtype).view(shape)
        if shortcut is None:
            return out
        return shortcut + out if shortcut_first else out + shortcut


def holder(place: FactorPlace) -> str:
    """The smallest module that holds a patched module and the layers that take its factor."""
    paths = [place.module.split('.'), *(parameter.name.split('.')[:-1] for parameter in place.parameters)]
    same = 0
    while all(len(path) > same for path in paths) and len({path[same] for path in paths}) == 1:
        same += 1
    return '.'.join(paths[0][:same])


def difference(model: nn.Module, place: FactorPlace, call: tuple[Any, Any], channel_dim: int, like: Constant) -> str:
    """Compares a constant in the place of a gate with the same in the weights, on a call of the module around.

    The factors are drawn anew between 0.5 and 1.5, with the signs of those that are to be folded, shifts between 0 and
    1, what the module was given gets some noise, as blank images would show little, and the arithmetic is float64 where
    the module runs in it.

    Args:
        model: The model, which is not touched.
        place: Where the constant is to go.
        call: What the smallest module around gate and layers was given, by place and by name.
        channel_dim: Axis of the channels.
        like: What is to be folded.

    Returns:
        What differs; empty if nothing does.
    """
    name = holder(place)
    drawn = torch.rand(2, len(like.factor), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = Constant(torch.copysign(drawn[0] + 0.5, like.factor), None if like.shift is None else drawn[1])
    outputs: list[list[Tensor]] = []
    for dtype in (torch.float64, None):
        try:
            outputs = [
                _run(model.get_submodule(name), name, place, call, dtype, constant, channel_dim, in_weights)
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
        if not one.numel():
            continue
        tolerance, largest = _TOLERANCES.get(one.dtype, _COARSE), float(one.abs().max())
        if not math.isfinite(largest):
            return 'its block gives numbers that are not finite'
        if not float((one - other).abs().max()) <= tolerance * max(largest, 1e-30):
            return f'in the weights of {", ".join(place.layers)} it gives other numbers'
    return ''


@torch.no_grad()
def _run(
    module: nn.Module,
    name: str,
    place: FactorPlace,
    call: tuple[Any, Any],
    dtype: torch.dtype | None,
    constant: Constant,
    channel_dim: int,
    in_weights: bool,
) -> list[Tensor]:
    twin = copy.deepcopy(module).cpu()
    twin = twin if dtype is None else twin.to(dtype)
    if in_weights:
        constant.put(twin, place, name)
    block = twin.get_submodule(place.module[len(name) :].lstrip('.'))
    beside = Constant(torch.ones_like(constant.factor)) if in_weights else constant
    block._modules[place.attribute] = Constantly(beside, channel_dim)

    generator = torch.Generator().manual_seed(1)

    def converted(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu().clone()
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor if dtype is None else tensor.to(dtype)
        return tensor + torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    args, kwargs = tree_map_only(Tensor, converted, call)
    found = tree_leaves(twin(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]
