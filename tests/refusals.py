"""Expecting an error, and a model that is what it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from tests.snapshot import assert_same, snapshot


@contextmanager
def refused(model: nn.Module, error: type[Exception], *parts: str) -> Iterator[None]:
    """Expects exactly this error, with a message that has all the parts, and an unchanged model."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error
    assert [part for part in parts if part not in message] == [], message
    assert_same(before, snapshot(model))
