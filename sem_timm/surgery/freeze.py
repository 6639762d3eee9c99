"""Parameters that a patch has made useless: kept, but not trained; on request dropped for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from sem_timm.errors import ModelError
from sem_timm.surgery.planning import check_model
from sem_timm.surgery.rewrite import edit_of

# Names of the frozen parameters and whether they required gradients before. The module that owns them keeps it, so that
# copies of the model, and parts of it, can be undone too.
_UNREAD = '_surgery_unread'
_COMPACT = '_surgery_compact'
# Those of them that are computed with all the same, though nobody reads the result.
_COMPUTED = '_surgery_computed'


def freeze(model: nn.Module, names: Iterable[str], computed: Iterable[str] = ()) -> None:
    """Stops parameters from requiring gradients, and remembers which of them did.

    Args:
        model: The model.
        names: Names of the parameters.
        computed: Names of modules and parameters that forwards still compute with.
    """
    inside = tuple(f'{name}.' for name in computed)
    for name in names:
        if f'{name}.'.startswith(inside):
            owner, key = _owner(model, name)
            owner.__dict__[_COMPUTED] = owner.__dict__.get(_COMPUTED, frozenset()) | {key}
        owner, key = _owner(model, name)
        parameter, unread = owner._parameters[key], owner.__dict__.get(_UNREAD, {})
        if parameter is not None and key not in unread:
            owner.__dict__[_UNREAD] = {**unread, key: parameter.requires_grad}
            parameter.requires_grad_(False)
            parameter.grad = None


def unfreeze(model: nn.Module) -> None:
    """Lets all parameters that were frozen require gradients again, if they did before."""
    for module in model.modules():
        module.__dict__.pop(_COMPUTED, None)
        for key, required in module.__dict__.pop(_UNREAD, {}).items():
            parameter = module._parameters[key]
            if parameter is not None and required:
                parameter.requires_grad_(True)


def unread_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that a swap has made useless."""
    return {
        f'{name}.{key}' if name else key
        for name, module in model.named_modules()
        for key in module.__dict__.get(_UNREAD, ())
    }


def trainable_parameters(model: nn.Module, *, not_in: torch.optim.Optimizer | None = None) -> Iterator[nn.Parameter]:
    """The parameters to give to an optimizer: those that require gradients and still reach the output.

    Args:
        model: Any model, patched or not.
        not_in: An optimizer that was made before the model was patched, and trains nothing that was put in since. With
            it, only the parameters that it does not have, which ``optimizer.add_param_group`` takes.

    Returns:
        An iterator over them, in the order of ``parameters()``.
    """
    useless = {id(module._parameters[key]) for module in model.modules() for key in module.__dict__.get(_UNREAD, ())}
    groups = [] if not_in is None else not_in.param_groups
    useless |= {id(parameter) for group in groups for parameter in group['params']}
    return (p for p in model.parameters() if p.requires_grad and id(p) not in useless)


def drop_unread_parameters(model: nn.Module) -> nn.Module:
    """Drops the parameters that a swap of attention has made useless, for good: there is no undo.

    For deployment; works in place. Keys of the dropped parameters leave the state_dict. What is still computed, as the
    plan tells, keeps its parameters, and packed projections keep all their rows. In models with windows, methods that
    make tables of positions anew, such as ``set_input_size``, need what was dropped.

    Args:
        model: A model whose attention was swapped.

    Returns:
        The model.

    Raises:
        ModelError: If nothing in the model was swapped, or something wraps it.
    """
    check_model(model)
    swapped = [module for module in model.modules() if (edit := edit_of(module)) and edit.position == 'core']
    if not swapped:
        raise ModelError(f'no attention of this {type(model).__name__} was swapped; there is nothing to drop.')
    for module in (inner for outer in swapped for inner in outer.modules()):
        unread, computed = module.__dict__.pop(_UNREAD, {}), module.__dict__.get(_COMPUTED, frozenset())
        for key in unread.keys() - computed:
            module._parameters[key] = None
            module.__dict__[_COMPACT] = True
        if computed:
            module.__dict__[_UNREAD] = {key: required for key, required in unread.items() if key in computed}
    return model


def check_not_compact(model: nn.Module) -> None:
    """Raises ModelError if parameters of the model were dropped, so that a patch cannot be undone."""
    for name, module in model.named_modules():
        if module.__dict__.get(_COMPACT):
            raise ModelError(
                f'{name} lost its old parameters to drop_unread_parameters; undo is for models that kept them.'
            )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition('.')
    return model.get_submodule(path), key
