"""Tables that a model computes once for many of its modules, such as shared position biases: not where none reads them.

The modules that hold them stay, with their parameters; the methods that the model calls return None.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.surgery.bytecode import names_called
from sem_timm.surgery.rewrite import Edit


def unread_tables(model: nn.Module, images: Tensor, unread: set[str], operation: Any) -> dict[str, Edit]:
    """Edits of modules that are still called and of which no parameter reaches the output any more.

    Args:
        model: A weightless copy of the model, its attention already swapped.
        images: What to run it on.
        unread: Names of the parameters that the swap has cut off.
        operation: The operation, for the edits.

    Returns:
        The edits, by name of the module; of nested modules the outermost.
    """
    edits: dict[str, Edit] = {}
    for name, module in model.named_modules():
        parameters = {f'{name}.{parameter}' for parameter, _ in module.named_parameters()}
        inside = tuple(f'{outer}.' for outer in edits)
        if parameters and parameters <= unread and not name.startswith(inside):
            methods = _called_methods(model, name, module, images)
            source = '\n\n'.join(f'def {method}(self, *args, **kwargs):\n    return None\n' for method in methods)
            if source:
                edits[name] = Edit(type(module), source, (), (), 'core', operation)
    return edits


def _called_methods(model: nn.Module, name: str, module: nn.Module, images: Tensor) -> list[str]:
    """Names of the module's own methods that a forward of the model calls from outside of it."""
    owner = model.get_submodule(name.rpartition('.')[0])
    named = {'forward', *names_called(type(owner))}
    own = [method for cls in type(module).__mro__ if cls not in nn.Module.__mro__ for method in vars(cls)]
    methods = {name for name in named.intersection(own) if isinstance(getattr(type(module), name), FunctionType)}
    called: dict[str, None] = {}
    depth = [0]
    for method in methods:
        module.__dict__[method] = _noted(getattr(module, method), method, called, depth)
    try:
        with torch.no_grad():
            model(images)
    finally:
        for method in methods:
            del module.__dict__[method]
    return sorted(called)


def _noted(method: Callable[..., Any], name: str, called: dict[str, None], depth: list[int]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        if not depth[0]:
            called[name] = None
        depth[0] += 1
        try:
            return method(*args, **kwargs)
        finally:
            depth[0] -= 1

    return noted
