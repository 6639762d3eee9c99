"""A weightless copy of a model, and one call of it on the meta device: what planning looks at instead of the model.

The copy has the model's classes, attributes and shapes, but no weights and no hooks, and it is in eval mode. Whatever
tracing or a probe does to it, caches it fills included, never reaches the live model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from sem_timm.compat import meta_is_checkpointed
from sem_timm.errors import ModelError, OptionError, place_of
from sem_timm.meta.layout import Layout, set_layout
from sem_timm.meta.layout_mode import AnsweringMode, LayoutMode
from sem_timm.meta.state import State

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


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments and its output, tensors on the meta device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Probe:
    """What one forward of the skeleton showed: the first call of every module, and how often each was called.

    Also which modules it left with another attribute than before, such as a counter, and the name of the attribute.
    """

    skeleton: nn.Module
    input_size: tuple[int, ...]
    calls: dict[str, Call] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


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


_FRESH = dict(nn.Module().__dict__)
_HOOKS = ('_forward_hooks', '_forward_pre_hooks')
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
            for store in _HOOKS:
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


def probe(model: nn.Module, input_size: tuple[int, ...] | None = None, batch_size: int = 2) -> Probe:
    """Runs a weightless copy of ``model`` once on meta tensors and records the calls of all its modules.

    Args:
        model: The model; it is not changed.
        input_size: Shape (C, H, W) of one input image; taken from the model where omitted.
        batch_size: Number of images in the probe.

    Raises:
        OptionError: If ``input_size`` has a wrong form or the model does not accept it.
        ModelError: If no input size is known and none of the likely ones is accepted.
    """
    failure: Exception | None = None
    found: Probe | None = None
    hooked = any(getattr(module, store) for module in model.modules() for store in _HOOKS)
    for size, with_own_hooks in product(_input_sizes(model, input_size), (False, True) if hooked else (False,)):
        # Of what decides by numbers, such as by x.sum() > 0, one way is taken; it is not read itself.
        for mode in (AnsweringMode(False), AnsweringMode(True)):
            try:
                # A fresh copy for each try: a forward that fails half-way may leave caches behind.
                found = Probe(weightless(model, with_own_hooks=with_own_hooks), size)
                _record(found, mode, _image(found.skeleton, size, batch_size))
                return found
            except Exception as error:  # any exception of a foreign forward: try the next size, report the first
                failure = failure or error
            if not mode.asked:
                break
    assert failure is not None
    reason = f'{type(failure).__name__}: {place_of(failure)}'
    part = None if found is None else _part_that_runs(found, batch_size)
    what, advice = f'does not accept input_size={input_size}:', ''
    if input_size is None:
        what = 'could not be run on a meta tensor to learn its shapes.'
        advice = '\n  Give the shape of one input: plan_model(model, ..., input_size=(3, 224, 224)).'
    if part is not None:
        call = f'plan_model(model.{part[0]}, ..., input_size={part[1]})'
        advice = f'\n  A part of it does, and can be patched where it is: {call}.'
    kind = ModelError if input_size is None else OptionError
    raise kind(f'{type(model).__name__} {what} {reason}{advice}') from failure


def _image(skeleton: nn.Module, size: tuple[int, ...], batch_size: int) -> torch.Tensor:
    image = torch.empty(batch_size, *size, dtype=dtype_of(skeleton), device='meta')
    return set_layout(image, Layout(channel=1))


def _part_that_runs(found: Probe, batch_size: int) -> tuple[str, tuple[int, ...]] | None:
    """Of a model that failed half-way the largest part that had run, and runs by itself; with its input size.

    Such as the backbone of a detector, which decides by numbers what comes after it.
    """
    parts = {}
    for name, call in found.calls.items():
        inputs = [*call.args, *call.kwargs.values()]
        if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) and inputs[0].ndim > 2:
            parts[name] = tuple(inputs[0].shape[1:])
    modules = {name: found.skeleton.get_submodule(name) for name in parts}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    name = max(sizes, key=sizes.__getitem__, default='')
    if not sizes or not sizes[name]:
        return None
    name = min((other for other in sizes if sizes[other] == sizes[name]), key=len)
    try:
        skeleton = weightless(modules[name])
        probe_call(skeleton, parts[name], _image(skeleton, parts[name], batch_size))
    except Exception:  # what its parent does before it matters
        return None
    return name, parts[name]


def probe_call(skeleton: nn.Module, input_size: tuple[int, ...], *args: Any, **kwargs: Any) -> Probe:
    """Calls a weightless copy once on meta tensors, which have layouts, and records the calls of all its modules."""
    found = Probe(skeleton, input_size)
    _record(found, LayoutMode(), *args, **kwargs)
    return found


def _record(found: Probe, mode: LayoutMode, *args: Any, **kwargs: Any) -> None:
    skeleton = found.skeleton
    modules = dict(skeleton.named_modules())
    states = {name: State(module) for name, module in modules.items()}
    for name, module in modules.items():
        # Where torch looks for a compiled call before it looks for hooks, which would cost more than the forwards.
        module.__dict__['_compiled_call_impl'] = _recorder(found, name, module)
    try:
        with torch.no_grad(), meta_is_checkpointed(), mode:
            skeleton(*args, **kwargs)
    finally:
        for module in modules.values():
            del module.__dict__['_compiled_call_impl']
    changed = {name: state.changed() for name, state in states.items()}
    found.changed.update((name, attributes[0]) for name, attributes in changed.items() if attributes)


def _recorder(found: Probe, name: str, module: nn.Module) -> Callable[..., Any]:
    """Calls a module's forward, counts the calls and keeps the first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        count = found.counts.get(name, 0)
        found.counts[name] = count + 1
        # The copy has no hooks, but a forward may have registered some, as to collect what its blocks return.
        called: Any = module._call_impl if module._forward_hooks or module._forward_pre_hooks else module.forward
        if count:
            return called(*args, **kwargs)
        # Lists are taken as they are now: dense blocks append to theirs later.
        given = _snapshot(args), {key: _snapshot(value) for key, value in kwargs.items()}
        output = called(*args, **kwargs)
        found.calls[name] = Call(*given, output)
        return output

    return call


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's first parameter, and so of its inputs."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _snapshot(value: Any) -> Any:
    return type(value)(map(_snapshot, value)) if type(value) in (list, tuple) else value


def _input_sizes(model: nn.Module, given: tuple[int, ...] | None) -> Iterator[tuple[int, ...]]:
    """The shapes to try, the likeliest first: the one given, the model's own image size, its pretrained one."""
    if given is not None:
        numbers = given if isinstance(given, (tuple, list)) else ()
        if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise OptionError(f'input_size={given!r} is not a shape of one input, such as (3, 224, 224).')
        yield tuple(given)
        return
    config = getattr(model, 'pretrained_cfg', None) or getattr(model, 'default_cfg', None) or {}
    pretrained = tuple(config.get('input_size') or (3, 224, 224))
    # A model made with another in_chans keeps the configuration of its pretrained weights, so its first layer counts
    # too; but some first layers see a transformed image, so it comes second.
    convs = (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    first = next(convs, None)
    channels = [pretrained[0], *([first.in_channels] if first is not None else [])]
    sizes = [*_own_image_sizes(model), pretrained[1:], (224, 224), (256, 256), (32, 32)]
    for count in dict.fromkeys(channels):
        for size in dict.fromkeys(sizes):
            yield (count, *size)


def _own_image_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in model.modules():
        size = module.__dict__.get('img_size')
        if isinstance(size, int):
            yield (size, size)
        elif isinstance(size, (tuple, list)) and size and all(isinstance(n, int) for n in size):
            yield tuple(size)
