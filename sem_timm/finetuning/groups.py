"""Parameter groups: timm's, by layer and weight decay, split into those of the base and those of new modules."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from sem_timm.compat import list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from sem_timm.errors import OptionError, closest
from sem_timm.finetuning.models import inserted_parameters
from sem_timm.finetuning.options import FinetuneOptions


def parameter_groups(model: nn.Module, options: FinetuneOptions) -> list[dict[str, Any]]:
    """All parameters that require gradients, each in one group.

    The learning rate of a group is that of the schedule times its ``lr_scale``: the factor of its layer, and for new
    modules ``new_lr_scale`` beside it. Its ``name`` says what it holds.
    """
    told: Any = getattr(model, 'no_weight_decay', None)
    unwanted = told() if told is not None else ()
    if options.layer_decay is None:
        groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=unwanted)
    else:
        groups = param_groups_layer_decay(
            model, options.weight_decay, no_weight_decay_list=unwanted, layer_decay=options.layer_decay
        )
    new = {id(parameter) for parameter in inserted_parameters(model).values()}
    parts = [
        _part(group, [p for p in group['params'] if (id(p) in new) is is_new], is_new, options)
        for group in groups
        for is_new in (False, True)
    ]
    return [part for part in parts if part['params']]


def _part(group: dict[str, Any], parameters: list[nn.Parameter], is_new: bool, options: FinetuneOptions) -> Any:
    scale = group.get('lr_scale', 1.0) * (options.new_lr_scale if is_new else 1.0)
    decay = 'weight decay' if group['weight_decay'] else 'no weight decay'
    name = f'{"new modules" if is_new else "base"}, {decay}, learning rate x {scale:.3g}'
    return {**group, 'params': parameters, 'lr_scale': scale, 'name': name}


def create_optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """timm's optimizer over `parameter_groups`.

    Raises:
        OptionError: If there is no such optimizer, or nothing to train.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise OptionError('nothing is left to train: no parameter requires a gradient.')
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay, param_group_fn=lambda _: groups
        )
    except (ValueError, AssertionError) as error:
        why = str(error) or f'unknown. {closest(options.optimizer, list_optimizers())}'  # timm < 1.0.12 says nothing
        raise OptionError(f'optimizer {options.optimizer!r}: {why}') from error
    return optimizer


def offending_groups(model: nn.Module, optimizer: torch.optim.Optimizer, *, gradients: bool) -> list[str]:
    """Groups with a parameter, or gradient, that is not finite; each with the first such parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for parameter in group['params']:
            tensor = parameter.grad if gradients else parameter
            if tensor is not None and not tensor.isfinite().all():
                found.append(f'{group["name"]} ({names.get(id(parameter), "a sharded parameter")})')
                break
    return found
