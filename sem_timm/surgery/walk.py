"""The modules of a model by name, without the recursion of generators that ``nn.Module.named_modules`` is."""

from __future__ import annotations

from torch import nn


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by their first names, in the order of ``named_modules``; the model itself is ``''``."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [('', model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f'{name}.' if name else ''
            children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found
