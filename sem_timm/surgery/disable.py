"""A patched model as its base, for a while: the modules get their own classes back and keep their new children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sem_timm.compat import forget_compiled
from sem_timm.errors import ModelError
from sem_timm.surgery.patch import check_undoable
from sem_timm.surgery.rewrite import DISABLED, edit_of


class _Off:
    """The mark of a module that is switched off. Copies and pickles do not carry it: nobody will switch them on."""

    def __reduce__(self) -> Any:
        return type(None), ()


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the base model: inside the ``with`` block no patch of ``model`` is in force.

    Nothing is moved or copied: weights, state_dict keys and hooks are the same inside and outside, new parameters just
    are not used. Blocks may be nested, and end as they should after an exception. A copy made inside is a copy of the
    base, and one in training mode still moves the statistics of its batch norms. While the block lasts, the model must
    not run in another thread, be patched or undone. Models that are wrapped in DDP or compiled can be switched off too;
    compiled ones are compiled once more for it.

    Args:
        model: The patched model.

    Returns:
        A context manager that gives the model.

    Raises:
        ModelError: If nothing in the model is patched, or it no longer holds its base: unread parameters were dropped.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f'a torch.nn.Module is needed, not {type(model).__name__}.')
    if not any(module.__dict__.get(DISABLED) or edit_of(module, inherited=True) for module in model.modules()):
        raise ModelError(f'{type(model).__name__} is not patched; there is nothing to switch off.')
    check_undoable(model)
    switched: list[tuple[nn.Module, type]] = []
    try:
        for module in model.modules():
            cls = base = type(module)
            while '_surgery_edit' in base.__dict__:
                base = base._surgery_edit.base  # type: ignore[attr-defined]
            if base is not cls:
                switched.append((module, cls))
                module.__dict__[DISABLED] = _Off()
                module.__class__ = base
        forget_compiled()
        yield model
    finally:
        for module, cls in switched:
            module.__class__ = cls
            module.__dict__.pop(DISABLED, None)
        forget_compiled()
