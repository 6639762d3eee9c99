"""A weightless copy of a model: what planning looks at instead of the model.

The copy has the model's classes, attributes and shapes, but no weights and no hooks, and it is in eval mode. Whatever
tracing or a probe does to it, caches it fills included, never reaches the live model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_SHARED: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_SHARED += (FunctionType, BuiltinFunctionType)


def weightless(model: nn.Module, *, with_own_hooks: bool = False) -> nn.Module:
    """Copies the structure of ``model`` to the meta device, in eval mode and without hooks; reads no weights.

    Args:
        model: The model.
        with_own_hooks: Keep hooks that come from the package of the model's class: its forwards may have registered
            them in an earlier call, and rely on what they collect.
    """
    copier = _Copier(on_meta)
    skeleton = copier.copy(model)
    if with_own_hooks:
        copier.copy_own_hooks(model)
    return skeleton


def _package(of: Any) -> str:
    return str(getattr(of, '__module__', '')).partition('.')[0]


def shadow(model: nn.Module) -> nn.Module:
    """Copies the structure of ``model`` around its own weights, in eval mode.

    Of its hooks it has those that come from the package of its class, on which its forwards may rely. What a forward
    of the copy fills in or counts, also in buffers, does not reach the model; its parameters are the model's own.
    """

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    copier = _Copier(own)
    twin = copier.copy(model)
    copier.copy_own_hooks(model)
    return twin


def filled(skeleton: nn.Module, generator: torch.Generator) -> nn.Module:
    """Copies a part of a weightless copy with random numbers for its weights; integers, mostly indices, are zero."""

    def numbers(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        scale = max(1, tensor[0].numel()) ** -0.5 if tensor.ndim > 1 else 1.0
        # Positive, so that variances among the buffers are.
        return torch.rand(tensor.shape, generator=generator).mul_(scale).to(tensor.dtype)

    return _Copier(numbers).copy(skeleton)


def on_meta(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the same shape and layout in memory without numbers; if it is floating-point, of some type."""
    chosen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=chosen, device='meta')


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's first parameter, and so of its inputs."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


_FRESH = dict(nn.Module().__dict__)
HOOKS = ('_forward_hooks', '_forward_pre_hooks')
_FLAGS_OF_HOOKS = ('_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs', '_forward_hooks_always_called')


class _Copier:
    """Copies modules with other tensors; what the original shares, the copy shares."""

    def __init__(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.convert = convert
        self.twins: dict[int, Any] = {}

    def copy(self, model: nn.Module) -> nn.Module:
        modules = list(model.modules())
        for module in modules:
            twin = object.__new__(type(module))
            # A fresh module's own attributes: empty hook dictionaries, and nothing shared with the live module.
            twin.__dict__.update(nn.Module().__dict__)
            self.twins[id(module)] = twin
        for module in modules:
            self._fill(self.twins[id(module)], module)
        copied: nn.Module = self.twins[id(model)]
        return copied

    def copy_own_hooks(self, model: nn.Module) -> None:
        """Gives the modules of a copy those of the original's hooks on forwards that come from its class's package."""
        package = _package(type(model))
        for module in model.modules():
            twin = self.twins[id(module)]
            for store in HOOKS:
                own = {key: hook for key, hook in getattr(module, store).items() if _package(hook) == package}
                getattr(twin, store).update((key, self._value(hook)) for key, hook in own.items())
            for store in _FLAGS_OF_HOOKS:
                getattr(twin, store).update(getattr(module, store))

    def _fill(self, twin: Any, module: nn.Module) -> None:
        state = twin.__dict__
        for name in ('_parameters', '_buffers'):
            state[name] = {key: None if t is None else self._tensor(t) for key, t in module.__dict__[name].items()}
        state['_modules'] = {key: self.twins.get(id(child)) for key, child in module._modules.items()}
        for name, value in module.__dict__.items():
            if name not in _FRESH:
                state[name] = value if type(value) in _SHARED else self._value(value)
        if 'forward' in twin.__dict__ and getattr(twin.forward, '__self__', None) is not twin:
            # A forward from elsewhere may hold on to the live module; the mark stays that there was one.
            twin.__dict__['forward'] = MethodType(type(twin).forward, twin)
        twin.__dict__['training'] = False

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self.twins:
            twin = self.convert(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            self.twins[id(tensor)] = nn.Parameter(twin, requires_grad=False) if is_parameter else twin
        converted: torch.Tensor = self.twins[id(tensor)]
        return converted

    def _value(self, value: Any) -> Any:
        """A plain attribute for the copy: modules and tensors become their twins, containers are copied."""
        if isinstance(value, _SHARED):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):  # one that is hidden in a list
            return self.twins[id(value)] if id(value) in self.twins else _Copier(self.convert).copy(value)
        if type(value) in (list, tuple, set):
            return type(value)(self._value(entry) for entry in value)
        if type(value) is dict:
            return {key: self._value(entry) for key, entry in value.items()}
        if isinstance(value, partial):
            arguments = [self._value(entry) for entry in value.args]
            return partial(self._value(value.func), *arguments, **self._value(value.keywords))
        if isinstance(value, tuple) and hasattr(value, '_fields'):
            return type(value)(*(self._value(entry) for entry in value))
        try:
            return self._mapping(value) if isinstance(value, dict) else copy.deepcopy(value, self.twins)
        except Exception:  # such as a lock or an open file
            return value

    def _mapping(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """A dictionary of a class of its own, which may forbid what dictionaries allow, such as ``update``."""
        try:
            copied = copy.copy(value)
        except Exception:  # even what a copy is filled by
            copied = type(value).__new__(type(value))
            vars(copied).update(vars(value))
        put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
        for key, entry in value.items():
            put(copied, key, self._value(entry))
        return copied
