"""One call of a weightless copy on the meta device, and what it shows of all the modules in it.

Of ``model(image)`` every module's first call is kept, with arguments and output that have shapes, memory and layouts,
but no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from sem_timm.compat import meta_is_checkpointed
from sem_timm.errors import ModelError, OptionError, place_of
from sem_timm.meta.layout import Layout, set_layout
from sem_timm.meta.layout_mode import AnsweringMode, LayoutMode
from sem_timm.meta.skeleton import HOOKS, dtype_of, weightless
from sem_timm.meta.state import State


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
    hooked = any(getattr(module, store) for module in model.modules() for store in HOOKS)
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
