"""Which modules of a model are its blocks.

A block is what the model itself calls one: a module named by the blocks of its ``group_matcher``; else a module with a
residual add; else a stage of its ``feature_info``. Where a named group is a stage or a shell without a residual add of
its own, the outermost modules with one inside it are the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from sem_timm.surgery.reading import Reader


def find_blocks(reader: Reader) -> list[str]:
    """Names of the blocks, in the order of ``named_modules``."""
    named = _named_by_group_matcher(reader)
    found: set[str] = set()
    for name in named:
        if reader.holds_residual(name):
            found.add(name)
        else:
            found.update(_outermost_residual(reader, name) or _steps(reader, name))
    found = found or set(_outermost_residual(reader, '')) or set(_feature_stages(reader))
    return [name for name in reader.modules if name in found]


def _named_by_group_matcher(reader: Reader) -> list[str]:
    """Modules with children whose full name a block pattern matches; the innermost where matches are nested."""
    stem, blocks = _patterns(reader.probe.skeleton)
    names = [
        name
        for name, module in reader.modules.items()
        if name and module._modules and any(pattern.fullmatch(name) for pattern in blocks)
        # timm looks at the stem first, whose pattern may be part of a block's.
        if not any(pattern.match(name) for pattern in stem)
    ]
    return [name for name in names if not any(other.startswith(name + '.') for other in names)]


def _patterns(model: nn.Module) -> tuple[list[re.Pattern[str]], list[re.Pattern[str]]]:
    """What the group matcher says of stem and blocks; nothing where there is none."""
    try:
        groups = model.group_matcher(coarse=False)  # type: ignore[operator]
    except Exception:  # there is none, or one that is not for this model
        groups = None
    if not isinstance(groups, dict):
        return [], []
    return list(_entries(groups.get('stem'))), list(_entries(groups.get('blocks')))


def _entries(group: Any) -> Iterator[re.Pattern[str]]:
    for entry in [group] if isinstance(group, (str, re.Pattern)) else group or ():
        pattern, ordinal = (entry, None) if isinstance(entry, (str, re.Pattern)) else entry
        if ordinal is None:  # a fixed ordinal marks norms and other parts that merely share a block's learning rate
            yield re.compile(pattern)


def _outermost_residual(reader: Reader, root: str) -> list[str]:
    """The outermost modules below ``root`` whose own forward has a residual add."""
    found: list[str] = []
    prefix = root + '.' if root else ''
    for name in reader.modules:
        inside = name.startswith(prefix) and name not in (root, '')
        if inside and not any(name.startswith(outer + '.') for outer in found) and reader.holds_residual(name):
            found.append(name)
    return found


def _steps(reader: Reader, name: str) -> list[str]:
    """A module, or if it is a container that gathers what its children return, those of them that are called."""
    name = reader.last_step(name)
    module = reader.modules[name]
    if not isinstance(module, (nn.Sequential, nn.ModuleDict)):
        return [name]
    return [f'{name}.{child}' for child in module._modules if f'{name}.{child}' in reader.probe.calls]


def _feature_stages(reader: Reader) -> list[str]:
    info = getattr(reader.probe.skeleton, 'feature_info', None) or ()
    entries = getattr(info, 'info', info)
    names = [entry.get('module') for entry in entries if isinstance(entry, dict)]
    return [name for name in names if name in reader.modules and name]
