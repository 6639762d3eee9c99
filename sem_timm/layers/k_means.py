"""Clustering of features by Lloyd's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from sem_timm.errors import OptionError

ROWS_AT_ONCE = 8192


def k_means(points: Tensor, count: int, iterations: int, generator: torch.Generator | None = None) -> Tensor:
    """Centres of clusters, found by moving randomly chosen points to the mean of what is nearest to them.

    Args:
        points: (n, d), with n of at least ``count``.
        count: Number of clusters.
        iterations: Number of moves.
        generator: Source of the choice of the first centres.

    Returns:
        (count, d). A centre that nothing is nearest to stays where it is.

    Raises:
        OptionError: If there are fewer points than clusters.
    """
    if len(points) < count:
        raise OptionError(f'k-means got {len(points)} vectors for {count} clusters; give at least {count}.')
    device = points.device if generator is None else generator.device
    chosen = torch.randperm(len(points), generator=generator, device=device)[:count]
    centers = points[chosen.to(points.device)]
    for _ in range(iterations):
        centers = cluster_means(points, nearest(points, centers), centers)
    return centers


def nearest(points: Tensor, centers: Tensor) -> Tensor:
    """The index of the centre that is nearest to each point."""
    lengths = centers.square().sum(1)
    # A few rows at a time: all distances at once would need n times as much memory as there are centres.
    return torch.cat([(lengths - 2 * rows @ centers.T).argmin(1) for rows in points.split(ROWS_AT_ONCE)])


def cluster_means(vectors: Tensor, cluster: Tensor, empty: Tensor) -> Tensor:
    """The mean of the vectors of each cluster; where a cluster has none, the row of ``empty``, (count, width)."""
    counts = torch.bincount(cluster, minlength=len(empty)).unsqueeze(1)
    sums = torch.zeros_like(empty).index_add_(0, cluster, vectors)
    return torch.where(counts > 0, sums / counts.clamp(min=1), empty)
