"""What is kept of a gate over the images: its mean, how much of it the image decides, and what a constant would lose.

All sums are taken of differences to the gate of the first image, in float64, so that of a constant gate they are
exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GateMoments:
    """Sums over the images that one gate has seen."""

    def __init__(self) -> None:
        self.count = 0
        self._first = self._sum = self._squares = torch.empty(0, dtype=torch.float64)
        self._energy = self._weighted = self._weighted_squares = self._total = self._first

    def update(self, gate: Tensor, energy: Tensor) -> None:
        """Takes in some images.

        Args:
            gate: Their gates (B, C).
            energy: The sums over positions of the squares of the branch (B, C).
        """
        gate, energy = gate.detach().cpu().double(), energy.detach().cpu().double()
        if not self.count:
            self._first = gate[0].clone()
            zeros = torch.zeros_like(self._first)
            self._sum, self._squares, self._energy = zeros.clone(), zeros.clone(), zeros.clone()
            self._weighted, self._weighted_squares, self._total = zeros.clone(), zeros.clone(), zeros.clone()
        difference = gate - self._first
        self.count += len(gate)
        self._sum += difference.sum(0)
        self._squares += difference.square().sum(0)
        self._energy += energy.sum(0)
        self._weighted += (energy * difference).sum(0)
        self._weighted_squares += (energy * difference.square()).sum(0)
        self._total += (energy * gate.square()).sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean gate of each channel (C,), in float64."""
        return self._first + self._sum / self.count

    @property
    def explained(self) -> float:
        """The part of the gate's variance over images and channels that is over images; 0 for a constant."""
        shift = self._sum / self.count
        within = (self._squares / self.count - shift.square()).clamp_min(0).mean()
        total = within + self.mean.var(correction=0)
        return float(within / total) if total > 0 else 0.0

    @property
    def loss(self) -> float:
        """The relative error of the gated branch, ``||y (g - mean)|| / ||y g||`` over all images; 0 for a constant."""
        shift = self._sum / self.count
        missed = self._weighted_squares - 2 * shift * self._weighted + shift.square() * self._energy
        total = self._total.sum()
        return float((missed.clamp_min(0).sum() / total).sqrt()) if total > 0 else 0.0
