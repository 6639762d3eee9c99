"""Tables by torchinfo."""

from __future__ import annotations

import torchinfo

from tests.clients.models import models

PROGRAM = 'torchinfo'
PACKAGES = ('torchinfo',)


def test_summary() -> None:
    """Parameters and layers of `summary`: the gates are there, and the rest is as before"""
    given = models()
    options = {'input_size': (1, 3, 64, 64), 'verbose': 0, 'depth': 8}
    plain, patched = (torchinfo.summary(model, **options) for model in (given.plain, given.patched))
    added = sum(p.numel() for name, p in given.patched.named_parameters() if '.sem.' in name)
    assert added and patched.total_params == plain.total_params + added
    assert 'SEM' in str(patched) and 'EfficientChannel' in str(patched)
    convolutions = {type(layer).__name__ for layer in given.patched.modules()}
    assert 'Conv1d' in convolutions and 'Conv1d' in str(patched)
