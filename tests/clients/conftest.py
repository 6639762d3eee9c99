"""Each file of this folder is about one program; it says which in ``PROGRAM``, and what has to be installed for it.

Tests of programs that ``dev`` does not install have the marker ``clients``, and are skipped where they are not there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# What `pip install -e '.[dev]'` brings along.
OF_DEV = {'accelerate', 'safetensors', 'torchvision', 'timm', 'onnxruntime'}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE:
            continue
        packages = getattr(item.module, 'PACKAGES', ())  # type: ignore[attr-defined]
        if not set(packages) <= OF_DEV:
            item.add_marker(pytest.mark.clients)
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f'{", ".join(missing)} is not installed'))
