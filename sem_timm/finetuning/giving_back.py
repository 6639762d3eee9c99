"""A model of the user's own, as it was, where a run with it could not begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sem_timm.finetuning.lora import merge_adapters
from sem_timm.finetuning.models import head_parameters
from sem_timm.surgery import patched_modules, unpatch_model

# Attributes that accelerate and torch.compile put on a model, with its own forward behind theirs.
_WRAPPING = ('forward', '_original_forward', '_is_accelerate_prepared', '_compiled_call_impl')


@contextmanager
def given_back_on_error(network: nn.Module | None) -> Iterator[None]:
    """Leaves a model of the user's own as it was, should what prepares it for training end in an error."""
    if network is None:
        yield
        return
    was_patched, attributes = bool(patched_modules(network)), {n: vars(network).get(n) for n in _WRAPPING}
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    head = [(parameter, parameter.detach().clone()) for parameter in head_parameters(network).values()]
    try:
        yield
    except BaseException:
        for name, value in attributes.items():
            vars(network).pop(name, None)
            if value is not None:
                vars(network)[name] = value
        merge_adapters(network)
        if patched_modules(network) and not was_patched:
            unpatch_model(network)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for parameter, values in head:  # which `head_scale` multiplies
                parameter.copy_(values)
        raise
