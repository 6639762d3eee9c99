"""Operations counted by fvcore."""

from __future__ import annotations

from fvcore.nn import FlopCountAnalysis

from tests.clients.models import images, models

PROGRAM = 'fvcore'
PACKAGES = ('fvcore',)


def test_flops() -> None:
    """`FlopCountAnalysis`: a little more than the base, and the gates by name"""
    given = models()
    plain, patched = (
        FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False) for model in (given.plain, given.patched)
    )
    gates = {name: count for name, count in patched.by_module().items() if name.endswith('.sem')}
    assert len(gates) == 4 and all(gates.values())
    assert plain.total() < patched.total() <= 1.02 * plain.total() + sum(gates.values())
