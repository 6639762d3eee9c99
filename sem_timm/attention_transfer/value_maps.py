"""The maps of a swapped core and its values, in closed form: layer after layer, on what the swapped model really sees.

A ridge regression per head, from the terms of `WithValues` to the original's output; one for image tokens, one for
prefix tokens. How strong the ridge is, is chosen for each by one half of the images for the other.

A layer is fitted when those before it are: what it is given in the swapped model is no longer what the original is
given there, and the maps that are best on the original's inputs are not best on these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.least_squares import LeastSquares
from sem_timm.attention_transfer.matching import narrow
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.attention_transfer.resuming import Look, ResumableRun, run_up_to
from sem_timm.errors import OptionError
from sem_timm.layers import WithValues
from sem_timm.meta import Call
from sem_timm.surgery import Computed, bound_arguments

# Strengths of the ridge that are tried, as parts of the mean of the diagonal.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def fit_values(pair: Pair, batches: list[Tensor], options: TransferOptions) -> None:
    """Fits the maps of all swapped cores that have them, in the order in which the model computes them."""
    layers = {layer.name: layer for layer in pair.layers if layer.with_values}
    if not layers:
        return
    if sum(map(len, batches)) < 2:
        raise OptionError(
            'calibration shows 1 image, and the maps of values are fitted on one half of the images for the other; '
            'give more: thousands are best.'
        )
    sums = {name: {c: _Sums(core) for c, core in layer.with_values.items()} for name, layer in layers.items()}
    if options.inputs == 'original':
        modules = {name: layer.teacher for name, layer in layers.items()}
        for images in batches:
            with narrow(options, images):
                found = run_up_to(modules, pair.teacher, images, _look_at_old(layers))
            for name, layer in layers.items():
                for child, old in found[name].items():
                    sums[name][child].add((old.query, old.key, old.value, old.extra), layer.with_values[child], old)
            del found
        for name, layer in layers.items():
            _solve(sums[name], layer)
        return
    order = _order(pair, list(layers), batches[0])
    teacher, student = (ResumableRun(model, order, options) for model in (pair.teacher, pair.student))
    for name in order:
        layer = layers[name]
        olds = teacher.reach(name, {name: layer.teacher}, batches, _look_at_old({name: layer}))
        news = student.reach(name, dict(layer.with_values), batches, lambda _, args, kwargs: (*args, *kwargs.values()))
        for found, given in zip(olds, news, strict=True):  # strict, so that both end
            for child, old in found[name].items():
                sums[name][child].add(given[child], layer.with_values[child], old)
        _solve(sums[name], layer)


def _solve(sums: dict[str, _Sums], layer: SwappedLayer) -> None:
    for child, core in layer.with_values.items():
        sums[child].solve(core)


def _precise(tensor: Tensor | None, core: WithValues) -> Any:
    """A tensor in the type of a core's parameters, which autocast may have narrowed; masks of yes and no stay."""
    return tensor.to(core.mix.dtype) if tensor is not None and tensor.is_floating_point() else tensor


class _Sums:
    """Sums for one core: for each kind of tokens, over the first and the second half of the images."""

    def __init__(self, core: WithValues) -> None:
        self.kinds = [[LeastSquares(), LeastSquares()] for _ in range(core.mix.shape[0])]
        self.count = 0

    def add(self, given: tuple[Any, ...], core: WithValues, old: Computed) -> None:
        """Takes in what the new core is given, and what the old one gave."""
        q, k, v, *mask = [_precise(tensor, core) for tensor in given]
        terms = {name: term.float() for name, term in core.inputs_of_maps(q, k, v, *mask).items()}
        outputs = core.heads_first(old.output).float()
        shape = outputs.shape[:3]
        one = outputs.new_ones(*shape, 1)
        rows = torch.cat([*(term.expand(*shape, -1) for term in terms.values()), one], -1)
        prefix = core.num_prefix_tokens
        for kind, tokens in enumerate((slice(prefix, None), slice(0, prefix))[: len(self.kinds)]):
            for half in (0, 1):
                some = slice((self.count + half) % 2, None, 2)
                inputs, wanted = (x[:, some, tokens].flatten(1, 2) for x in (rows, outputs))
                self.kinds[kind][half].add(inputs, wanted, inputs.new_ones(inputs.shape[1]))
        self.count += shape[1]

    def solve(self, core: WithValues) -> None:
        """Writes what was found into the core."""
        for kind, halves in enumerate(self.kinds):
            one, other = (half.over_processes() for half in halves)
            missed = torch.stack(
                [other.missed(one.solution(ridge)) + one.missed(other.solution(ridge)) for ridge in RIDGES]
            )
            best = missed.argmin(0)
            total = one + other
            solutions = torch.stack([total.solution(ridge) for ridge in RIDGES])
            found = solutions[best, torch.arange(len(best))]  # (heads, terms * width + 1, width)
            width = core.value_dim
            maps = found[:, :-1].unflatten(1, (len(core.terms), width)).transpose(0, 1)
            core.mix[kind].copy_(maps)
            core.bias[kind].copy_(found[:, -1])


def _order(pair: Pair, names: list[str], images: Tensor) -> list[str]:
    """Names of layers in the order in which the original computes them."""
    seen: list[str] = []
    handles = []
    for layer in pair.layers:
        handles.append(layer.teacher.register_forward_pre_hook(lambda *_, name=layer.name: seen.append(name)))
    try:
        pair.teacher(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in dict.fromkeys(seen) if name in names]


def _look_at_old(layers: dict[str, SwappedLayer]) -> Look:
    """Tells what goes into the old cores of a layer that have maps and what comes out of them, by child."""
    by_module = {id(layer.teacher): layer for layer in layers.values()}

    def look(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Computed]:
        layer = by_module[id(module)]
        arguments = bound_arguments(layer.teacher, Call(args, kwargs, None))
        found = layer.original.compute(layer.teacher, arguments, with_extra=layer.masked)
        return {child: found[child] for child in layer.with_values}

    return look
