"""Everything about a model that an undone or failed operation must leave as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Snapshot = dict[str, Any]


def snapshot(model: nn.Module) -> Snapshot:
    """Values and identities of tensors, classes, attributes, flags, hooks, and the state of the random generator."""
    seen: Snapshot = {'rng': torch.get_rng_state().clone()}
    for name, module in model.named_modules():
        seen[f'{name} class'] = type(module)
        for key, value in module.__dict__.items():
            if key == '_modules':
                seen[f'{name}.{key}'] = [(child, id(other)) for child, other in value.items()]
            elif key in ('_parameters', '_buffers'):
                seen[f'{name}.{key}'] = list(value)
                for tensor_name, tensor in value.items():
                    seen[f'{name}.{tensor_name}'] = None if tensor is None else _tensor(tensor)
            elif isinstance(value, Tensor):
                seen[f'{name}.{key}'] = _tensor(value)
            else:
                seen[f'{name}.{key}'] = repr(value) if isinstance(value, (dict, list, tuple, set)) else id(value)
    return seen


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    value = tensor.detach().clone() if not tensor.is_meta else tuple(tensor.shape)
    return id(tensor), tensor.requires_grad, tensor.grad, value


def assert_same(before: Snapshot, after: Snapshot, *, random_state: bool = True) -> None:
    """Fails with the name of the first thing that differs.

    Args:
        before: A snapshot.
        after: Another one.
        random_state: Whether the random generator counts; building new weights draws from it, as building any module.
    """
    if not random_state:
        before, after = {**before, 'rng': None}, {**after, 'rng': None}
    assert list(before) == list(after), set(before) ^ set(after)
    for name, value in before.items():
        assert _equal(value, after[name]), name


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)
