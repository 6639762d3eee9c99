"""Settings for all tests."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest
import torch

import tests.small_models  # noqa: F401 (before any of sem_timm)
from tests.versions import lacking

torch.set_num_threads(1)  # the tests run in parallel processes


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """A million objects of torch, timm and the tests stay to the end: the garbage collector does not go through them.

    It took a sixth of the time of the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(10_000, 10, 10)


def _without_what_older_timm_lacks() -> Generator[None, object, object]:
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        # Where a warning was waited for, what was raised instead.
        if reason := lacking(error) or lacking(error.__context__):
            pytest.skip(reason)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """A fixture of an architecture that this timm has not: its tests do not run."""
    return (yield from _without_what_older_timm_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test of an architecture that this timm has not does not run."""
    return (yield from _without_what_older_timm_lacks())
