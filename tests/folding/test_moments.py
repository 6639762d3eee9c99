"""Sums over batches against the same taken at once."""

from __future__ import annotations

import pytest
import torch

from sem_timm.folding.moments import GateMoments


def test_sums_over_batches_are_those_of_all_images() -> None:
    gates, branch = torch.rand(7, 5) + 0.5, torch.randn(7, 5, 9).double()
    found = GateMoments()
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        found.update(gates[part], branch[part].square().sum(2))
    wide, mean = gates.double(), gates.double().mean(0)
    torch.testing.assert_close(found.mean, mean)
    assert found.explained == pytest.approx(float(wide.var(0, correction=0).mean() / wide.var(correction=0)))
    missed = branch * (wide - mean)[..., None]
    assert found.loss == pytest.approx(float(missed.norm() / (branch * wide[..., None]).norm()))


def test_a_constant_gate_is_exactly_that() -> None:
    found = GateMoments()
    gate = torch.rand(5)
    for _ in range(3):
        found.update(gate.expand(4, 5), torch.rand(4, 5))
    assert torch.equal(found.mean, gate.double()) and found.loss == found.explained == 0


def test_a_branch_of_zeros_loses_nothing() -> None:
    found = GateMoments()
    found.update(torch.rand(4, 5), torch.zeros(4, 5))
    assert found.loss == 0 and 0 < found.explained < 1
