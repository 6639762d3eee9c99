"""Values in closed form: what gives the original's outputs best, given the attention to slots, or terms to map."""

from __future__ import annotations

import torch
from torch import Tensor

from sem_timm.attention_transfer.processes import total

# Added to the diagonal, as a part of its mean: slots that attend alike share a value, and rounding does not decide it.
RIDGE = 1e-5


class LeastSquares:
    """Sums that grow batch by batch, of one core: per head, attention (R, S) against outputs (R, value_dim)."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.moment: Tensor | None = None
        self.energy: Tensor | None = None

    def add(self, attention: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Takes in attention (heads, R, S), what the original gave, (heads, R, value_dim), and the weights (R)."""
        roots = weights.float().sqrt().unsqueeze(-1)
        attention, outputs = attention.float() * roots, outputs.float() * roots
        # Summed in float64, and on the CPU, as not every device has that type.
        gram = (attention.mT @ attention).cpu().double()
        moment = (attention.mT @ outputs).cpu().double()
        energy = outputs.square().sum((1, 2)).cpu().double()
        if self.gram is None or self.moment is None or self.energy is None:
            self.gram, self.moment, self.energy = gram, moment, energy
        else:
            self.gram, self.moment, self.energy = self.gram + gram, self.moment + moment, self.energy + energy

    def __add__(self, other: LeastSquares) -> LeastSquares:
        """The sums over what both have seen."""
        both = LeastSquares()
        both.gram, both.moment, both.energy = (one + two for one, two in zip(self._sums(), other._sums()))
        return both

    def over_processes(self) -> LeastSquares:
        """The sums over what all processes have seen."""
        whole = LeastSquares()
        whole.gram, whole.moment, whole.energy = map(total, self._sums())
        return whole

    def solution(self, ridge: float = RIDGE) -> Tensor:
        """The values (heads, S, value_dim) with the smallest squared error, and what they weigh themselves.

        Args:
            ridge: What is added to the diagonal, as a part of its mean.
        """
        gram, moment, _ = self._sums()
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        added = torch.diag_embed((ridge * diagonal.mean(-1, keepdim=True) + 1e-30).expand_as(diagonal))
        return torch.linalg.solve(gram + added, moment)

    def missed(self, values: Tensor) -> Tensor:
        """The squared error of memories of values, per head."""
        gram, moment, energy = self._sums()
        values = values.cpu().double()
        return energy - 2 * (values * moment).sum((1, 2)) + (values * (gram @ values)).sum((1, 2))

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.gram is not None and self.moment is not None and self.energy is not None
        return self.gram, self.moment, self.energy
