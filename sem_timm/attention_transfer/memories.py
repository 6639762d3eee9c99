"""Memories from data: values from the original's outputs, keys as drawn or from the clusters of the original's.

The double normalisation of external attention is a softmax over the slots in which each slot's logit is lowered by the
log-sum-exp of that slot over the tokens of the image. So a slot's weight tells where a token stands among the others of
its image and not what all of them have in common, and the mean value of a cluster of keys is no good guess of what the
slot should give. The values that give the original's outputs best are a linear least-squares problem, solved here.
For that, keys drawn at random were a better basis than centres of clusters where it was measured, on a transformer of
four blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sem_timm.attention_transfer.least_squares import LeastSquares
from sem_timm.attention_transfer.measure import visiting
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.attention_transfer.processes import take_from_main
from sem_timm.errors import OptionError, RefusedError
from sem_timm.layers import ExternalAttention
from sem_timm.layers.k_means import cluster_means, k_means, nearest
from sem_timm.meta import Call
from sem_timm.surgery import Computed, bound_arguments

# Tokens that k-means looks at, per core.
ROWS = 16384


def _token_weights(old: Computed, num_prefix_tokens: int) -> Tensor:
    """How much each token counts (N): the leading ones together as much as all others together."""
    count, prefix = old.query.shape[-2], num_prefix_tokens
    weights = old.query.new_ones(count)
    if 0 < prefix < count:
        weights[:prefix], weights[prefix:] = count / prefix / 2, count / (count - prefix) / 2
    return weights


def _rows(old: Computed, core: ExternalAttention) -> tuple[Tensor, Tensor]:
    """Queries and outputs, (heads, R, d) each."""
    return core.heads_first(old.query).flatten(1, 2), core.heads_first(old.output).flatten(1, 2)


def _keys_and_values(old: Computed, core: ExternalAttention) -> tuple[Tensor, Tensor]:
    """Keys and values, (heads, R, d) each; heads that share theirs get one copy each."""
    leading = old.query.shape[:-2]
    key, value = (x.expand(*leading, *x.shape[-2:]) for x in (old.key, old.value))
    return core.heads_first(key).flatten(1, 2), core.heads_first(value).flatten(1, 2)


def check_memories(pair: Pair) -> None:
    """Raises RefusedError if some swapped layer has no memories that could be initialised from the original's core."""
    for layer in pair.layers:
        if layer.original.graph is None:
            raise RefusedError(
                f'{layer.name}: {layer.edit.operation} replaced the whole attention module, with queries of '
                'its own, so that no core tells what its memories should hold. '
                "stages=('match',) trains it to give the same outputs."
            )
        if len({*layer.cores, *layer.with_values}) < len(layer.edit.inserted):
            raise RefusedError(
                f"{layer.name}: {layer.edit.operation} has no memories of keys and values; 'initialize' is for "
                "'external', and for attentions swapped with own=True or local=True. stages=('match',) trains what "
                'it has.'
            )


@torch.no_grad()
def initialize(pair: Pair, batches: list[Tensor], options: TransferOptions) -> dict[str, list[float]]:
    """Gives all memories of the student what the original's keys, queries and outputs say.

    Returns:
        The sharpness that was chosen for each head, by the name of the core.
    """
    check_memories(pair)
    if not _cores(pair):
        return {}
    centers = _clusters(pair, batches, options)
    sums: dict[str, list[LeastSquares]] = {name: [LeastSquares() for _ in options.sharpness] for name in centers}
    bases = {name: _basis(core) for name, core in _cores(pair).items()}
    prefix = {f'{layer.name}.{child}': layer.num_prefix_tokens for layer in pair.layers for child in layer.cores}

    def add(name: str, core: ExternalAttention, old: Computed, _: float) -> None:
        outputs = _rows(old, core)[1]
        weights = _token_weights(old, prefix[name]).repeat(outputs.shape[1] // old.query.shape[-2])
        for factor, problem in zip(options.sharpness, sums[name]):
            bases[name].mk.copy_((centers[name][0] * factor).reshape(bases[name].mk.shape))
            attention = bases[name](old.query, old.extra)
            problem.add(core.heads_first(attention).flatten(1, 2), outputs, weights)

    _over_cores(pair, batches, add)
    sums = {name: [problem.over_processes() for problem in problems] for name, problems in sums.items()}
    chosen = {}
    for name, core in _cores(pair).items():
        keys, means = centers[name]
        solutions = [p.solution() if options.values == 'least-squares' else means.double() for p in sums[name]]
        missed = torch.stack([problem.missed(values) for problem, values in zip(sums[name], solutions)])
        best = missed.argmin(0)
        factors = torch.tensor(options.sharpness)[best]
        core.mk.copy_((keys * factors.to(keys)[:, None, None]).reshape(core.mk.shape))
        picked = torch.stack([solutions[choice][head] for head, choice in enumerate(best.tolist())])
        core.mv.copy_(picked.reshape(core.mv.shape))
        chosen[name] = factors.tolist()
    return chosen


def _cores(pair: Pair) -> dict[str, ExternalAttention]:
    return {f'{layer.name}.{child}': core for layer in pair.layers for child, core in layer.cores.items()}


def _basis(core: ExternalAttention) -> ExternalAttention:
    """A core whose output is its attention: the slots are one-hot values."""
    slots = core.memory
    weight = core.mk
    basis = ExternalAttention(
        core.head_dim,
        slots,
        core.num_heads,
        core.head_axis,
        memory=slots,
        norm=core.norm,
        device=weight.device,
        dtype=weight.dtype,
    )
    basis.mv.copy_(torch.eye(slots).expand_as(basis.mv))
    return basis


def _over_cores(pair: Pair, batches: list[Tensor], visit: Any) -> None:
    """Runs the teacher and calls ``visit(name, core, computed, scale)`` for each old core of each batch."""

    def look(layer: SwappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        arguments = bound_arguments(layer.teacher, Call(args, kwargs, None))
        computed = layer.original.compute(layer.teacher, arguments, with_extra=layer.masked)
        for child, core in layer.cores.items():
            visit(f'{layer.name}.{child}', core, computed[child], layer.original.cores[child].scale.of_products)

    with visiting(pair, look) as teacher:
        for images in batches:
            teacher(images)


def _clusters(pair: Pair, batches: list[Tensor], options: TransferOptions) -> dict[str, tuple[Tensor, Tensor]]:
    """For each core the memories of keys at sharpness 1, (heads, d, S), and the means of values, (heads, S, d_v)."""
    if options.keys == 'swap':
        cores = _cores(pair).items()
        return {
            name: (core.mk.reshape(core.num_heads, core.head_dim, -1).clone(), torch.empty(0)) for name, core in cores
        }
    generator = torch.Generator().manual_seed(options.seed)
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in _cores(pair)}
    scales: dict[str, float] = {}

    def sample(name: str, core: ExternalAttention, old: Computed, scale: float) -> None:
        points, values = _keys_and_values(old, core) if options.keys == 'keys' else _rows(old, core)
        chosen = torch.randperm(points.shape[1], generator=generator)[: -(-ROWS // len(batches))].to(points.device)
        kept[name].append((points[:, chosen].float(), values[:, chosen].float()))
        scales[name] = scale

    _over_cores(pair, batches, sample)
    found = {}
    for name, core in _cores(pair).items():
        points, values = (torch.cat(parts, 1) for parts in zip(*kept[name]))
        if points.shape[1] < core.memory:
            raise OptionError(
                f'{name} has {core.memory} slots and calibration shows {points.shape[1]} tokens; give more images.'
            )
        # Queries have a mean that the normalisation over tokens takes out, and another scale than keys.
        if options.keys == 'queries':
            points = (points - points.mean(1, keepdim=True)) / points.var((1, 2), keepdim=True).clamp(min=1e-12)
        clusters = [_clustered(p, v, core.memory, options.iterations, generator) for p, v in zip(points, values)]
        scale = scales[name] if options.keys == 'keys' else 1.0
        found[name] = (
            torch.stack([keys.mT for keys, _ in clusters]) * scale,
            torch.stack([means for _, means in clusters]),
        )
        take_from_main(found[name])
    return found


def _clustered(
    points: Tensor, values: Tensor, count: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    centers = k_means(points, count, iterations, generator)
    overall = values.mean(0, keepdim=True).expand(count, -1)
    return centers, cluster_means(values, nearest(points, centers), overall.contiguous())
