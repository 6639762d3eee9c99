"""Clustering by Lloyd's algorithm."""

from __future__ import annotations

import pytest
import torch

from sem_timm.errors import OptionError
from sem_timm.layers import k_means as module
from sem_timm.layers.k_means import cluster_means, k_means, nearest


def test_the_nearest_centre_is_that_of_the_smallest_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centers = torch.randn(50, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    expected = (points[:, None] - centers).square().sum(-1).argmin(1)
    assert torch.equal(nearest(points, centers), expected)
    monkeypatch.setattr(module, 'ROWS_AT_ONCE', 8)
    assert torch.equal(nearest(points, centers), expected)


def test_every_move_brings_the_centres_nearer() -> None:
    points = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spreads = []
    for iterations in (0, 1, 2, 5, 50, 51):
        centers = k_means(points, 8, iterations, torch.Generator().manual_seed(0))
        spreads.append(float((points - centers[nearest(points, centers)]).square().sum()))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > spreads[1] > spreads[3] and spreads[4] == spreads[5]


def test_clusters_without_vectors_keep_what_they_are_given() -> None:
    vectors, empty = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([[7.0], [8.0], [9.0]])
    assert cluster_means(vectors, torch.tensor([0, 0, 2]), empty).tolist() == [[2.0], [8.0], [5.0]]
    same = torch.ones(6, 2)
    assert torch.equal(k_means(same, 3, 4), torch.ones(3, 2))


def test_as_many_clusters_as_points_are_the_points() -> None:
    points = torch.randn(6, 3)
    centers = k_means(points, 6, 3)
    assert sorted(centers.tolist()) == sorted(points.tolist())
    with pytest.raises(OptionError, match='6 vectors for 7 clusters; give at least 7'):
        k_means(points, 7, 3)
