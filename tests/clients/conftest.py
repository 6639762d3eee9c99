"""Each file of this folder is about one program; it says which in ``PROGRAM``, and what is imported in ``PACKAGES``.

Tests of programs that ``dev`` does not install have the marker ``clients``; where they are not installed, the file is
left out.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# What `pip install -e '.[dev]'` brings along.
OF_DEV = {'accelerate', 'safetensors', 'torchvision', 'timm', 'onnxruntime'}


def packages_of(path: Path) -> tuple[str, ...]:
    """What a file imports, read without running it."""
    for statement in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == 'PACKAGES':
            return tuple(ast.literal_eval(statement.value))
    return ()


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


PACKAGES = {path: packages_of(path) for path in HERE.glob('test_*.py')}

collect_ignore = [path.name for path, packages in PACKAGES.items() if not all(map(is_installed, packages))]
if 'TIMM_REPOSITORY' not in os.environ:  # a checkout of timm, whose wheel lacks its scripts
    collect_ignore.append('test_timm_scripts.py')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not set(PACKAGES.get(item.path, ())) <= OF_DEV:
            item.add_marker(pytest.mark.clients)
