"""What a gate could win at first order: gradients of the loss in its logits, and numbers that rank sites by them.

With the gate of a site at the identity, d is the gradient (N, C) of each image's loss in the logits of its gate, up to
a factor that is the same at all sites. A step along u lowers the loss of image i by d_i·u_i to first order. Directions
are made of some images and judged on others: what a step wins on images that it was made of says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranking.network import BATCH, Head

NUM_FOLDS = 4


@dataclass(frozen=True)
class Gradients:
    """What is known of one site.

    Attributes:
        own: Gradients (N, C) with the head fitted on the same images.
        held_out: Gradients (N, C) with a head that was fitted on the other folds.
        pooled: What the gate is given (N, C).
        hidden: The features (N, h) before its last layer.
        folds: The fold of each image (N,).
    """

    own: Tensor
    held_out: Tensor
    pooled: Tensor
    hidden: Tensor
    folds: Tensor


def fold_of(number: int) -> Tensor:
    """The fold of each image; those of a fold lie together."""
    return torch.arange(number) * NUM_FOLDS // number


def gradients(
    network: Callable[[Tensor], Tensor], gates: dict[str, Any], x: Tensor, labels: Tensor, base: Tensor, decay: float
) -> dict[str, Gradients]:
    """Gradients at all sites.

    Args:
        network: From the input of the first block to features, with identity gates at all sites.
        gates: The operators of the gates, 'se', by site.
        x: Input of the first block (N, C, H, W).
        labels: Labels (N,).
        base: Features (N, D), for the heads.
        decay: Of the heads.
    """
    folds, num_classes = fold_of(len(labels)), int(labels.max()) + 1
    own_head = Head(base, num_classes, decay).fit(base, labels)
    heads = [
        Head(base[folds != fold], num_classes, decay).fit(base[folds != fold], labels[folds != fold])
        for fold in range(NUM_FOLDS)
    ]
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(site: str) -> Any:
        def hook(operator: Any, given: tuple[Tensor], logits: Tensor) -> None:
            seen[site] = logits, given[0].detach(), operator.fc1(given[0]).relu().detach()

        return hook

    handles = [gate.register_forward_hook(keep(site)) for site, gate in gates.items()]
    found: dict[str, list[tuple[Tensor, ...]]] = {site: [] for site in gates}
    for batch in (part for fold in range(NUM_FOLDS) for part in (folds == fold).nonzero().flatten().split(BATCH)):
        values = network(x[batch])
        logits = [seen[site][0] for site in gates]
        pair = []
        for head in (own_head, heads[int(folds[batch[0]])]):
            loss = torch.nn.functional.cross_entropy(head(values), labels[batch], reduction='sum')
            pair.append(torch.autograd.grad(loss, logits, retain_graph=True))
        for number, site in enumerate(gates):
            found[site].append((pair[0][number], pair[1][number], seen[site][1], seen[site][2]))
    for handle in handles:
        handle.remove()
    joined = {site: [torch.cat(tensors) for tensors in zip(*batches)] for site, batches in found.items()}
    return {site: Gradients(*tensors, folds) for site, tensors in joined.items()}


def scores(site: Gradients) -> dict[str, float]:
    """All numbers that were tried, by name."""
    found = {}
    for heads, d in (('own head', site.own), ('held-out head', site.held_out)):
        mean, variance = d.mean(0), d.var(0)
        found[f'norm, {heads}'] = float(mean.norm())
        found[f'norm over spread, {heads}'] = float((mean.square() / variance).sum().sqrt())
        for name, direction in DIRECTIONS.items():
            along, lengths = _judged(site, d, direction)
            found[f'{name}, gain, {heads}'] = float(along.mean() / lengths.square().mean().sqrt())
            found[f'{name}, gain over spread, {heads}'] = float(along.mean() / along.square().mean().sqrt())
    return found


def _judged(site: Gradients, d: Tensor, direction: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """What each image wins by a step that was made of the other folds (N,), and the lengths of the steps (N,)."""
    along, lengths = torch.empty(len(d)), torch.empty(len(d))
    for fold in range(NUM_FOLDS):
        judged = site.folds == fold
        step = direction(
            d[~judged], site.pooled[~judged], site.hidden[~judged], site.pooled[judged], site.hidden[judged]
        )
        along[judged] = (d[judged] * step).sum(1)
        lengths[judged] = step.norm(dim=1)
    return along, lengths


def _constant(d: Tensor, pooled: Tensor, hidden: Tensor, new_pooled: Tensor, new_hidden: Tensor) -> Tensor:
    """The same step for all images: the mean gradient."""
    return d.mean(0).expand(len(new_pooled), -1)


def _natural(d: Tensor, pooled: Tensor, hidden: Tensor, new_pooled: Tensor, new_hidden: Tensor) -> Tensor:
    """The same step for all images: the mean gradient, over the second moments of the gradients of all channels."""
    moments = d.T @ d / len(d)
    ridge = 0.1 * moments.trace() / len(moments)
    return torch.linalg.solve(moments + ridge * torch.eye(len(moments)), d.mean(0)).expand(len(new_pooled), -1)


def _of_the_gate(d: Tensor, pooled: Tensor, hidden: Tensor, new_pooled: Tensor, new_hidden: Tensor) -> Tensor:
    """The step that gradient descent on the last layer of the operator makes."""
    kernel = new_hidden @ hidden.T + 1
    return kernel @ d / len(d)


def _ridge(d: Tensor, pooled: Tensor, hidden: Tensor, new_pooled: Tensor, new_hidden: Tensor) -> Tensor:
    """What of the gradient is a linear function of the pooled features, by a ridge regression."""
    mean, std = pooled.mean(0), pooled.std(0) + 1e-6
    inputs, new = ((values - mean) / std for values in (pooled, new_pooled))
    kernel = inputs @ inputs.T / inputs.shape[1]
    weights = torch.linalg.solve(
        kernel + 0.1 * len(d) * kernel.diagonal().mean() * torch.eye(len(d)) / 10, d - d.mean(0)
    )
    return d.mean(0) + new @ inputs.T / inputs.shape[1] @ weights


DIRECTIONS: dict[str, Callable[..., Tensor]] = {
    'constant': _constant,
    'natural': _natural,
    'gate': _of_the_gate,
    'ridge': _ridge,
}
