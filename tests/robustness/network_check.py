"""What must hold for any network: planned and patched, it computes what it computed, bit for bit, or it is refused."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import GuardError, ModelError, RefusedError
from tests.robustness.network_source import Network
from tests.snapshot import assert_same, snapshot
from tests.twins import inserted


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        kind: 'patched', 'refused', or 'invalid' for one that does not run or train by itself.
        positions: Where each site is.
        reasons: Why modules were refused.
        guarded: Runs at other shapes that ended in a `GuardError`.
        late: Whether a child changes a branch in place after its sum, which torch does not differentiate.
    """

    kind: str
    positions: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    guarded: int = 0
    late: bool = False


@dataclass(frozen=True)
class Run:
    """Everything that can be seen of one forward and backward."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    random_states: tuple[Any, ...]


# torch's words for a branch that somebody changes before its gradient is computed.
_LATE = 'modified by an inplace operation'
_WRITES = re.compile(r'add_\(|iadd|\+=')

# What a network does in its own forward and backward, before anything is done to it.
_OWN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError)


# Insertions that start as identities, in all their places.
OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    'sem': ('sem', {}),
    'sem on all branches': ('sem', {'branches': 'all'}),
    'sem on outputs': ('sem', {'position': 'output'}),
    'se': ('se', {}),
    'eca on all branches': ('eca', {'branches': 'all'}),
    'ie on branches': ('ie', {'position': 'residual'}),
    'external2d': ('external2d', {}),
    'sem on branches': ('sem', {'position': 'residual', 'operators': ('ie', 'se')}),
}


def check_network(network: Network, operation: tuple[str, dict[str, Any]]) -> Outcome:
    """Plans and patches a network and compares it with its base in every way.

    Args:
        network: The network.
        operation: One of `OPERATIONS`.

    Returns:
        What became of it.
    """
    name, options = operation
    base, model = network.build(), network.build()
    images = torch.randn(2, *network.size, generator=torch.Generator().manual_seed(1))
    # One of the rarer modes and one other shape each, or ten thousand networks would take hours.
    turn = zlib.crc32(network.source.encode())
    modes = ('eval', 'train', ('no_grad', 'frozen')[turn % 2])
    expected = _runs_of(base, images, modes)
    if not expected:
        return Outcome('invalid')
    before = snapshot(model)
    try:
        plan = sem_timm.plan_model(model, name, input_size=network.size, **options)
    except (RefusedError, ModelError) as error:
        assert_same(before, snapshot(model))
        return Outcome('refused', reasons=(str(error),))
    assert_same(before, snapshot(model))
    _check_layouts(plan, network)
    sem_timm.patch_model(sem_timm.unpatch_model(sem_timm.patch_model(model, plan)), plan)
    got, late = _runs_of(model, images, expected), False
    # External attention has its channels in another place, and a sum that is written into a view has a gradient in
    # another place than one that is not: sums of gradients have another order then.
    leaky = name == 'external2d' or _WRITES.search(network.source) is not None or _leaks(plan, network.build(), images)
    for mode, its in expected.items():
        error = '' if mode in got else _error(model, images, mode)
        if _LATE in error:  # by a child that changes what it is given; torch tells
            late = True
            continue
        assert not error, f'{mode}: the base runs, and the patched network does not: {error}'
        assert_equal_runs(its, got[mode], mode, leaky)
    guarded = _check_another_shape(network, model, OTHERS[turn % len(OTHERS)], leaky)
    _check_sites_act(model, plan, images)
    sem_timm.unpatch_model(model)
    fresh = network.build()
    assert [*fresh.state_dict()] == [*model.state_dict()]
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    positions = tuple(site.position for site in plan)
    return Outcome('patched', positions, tuple(refusal.reason for refusal in plan.refusals), guarded, late)


MODES = ('eval', 'no_grad', 'frozen', 'train')


def _runs_of(model: nn.Module, images: Tensor, modes: Collection[str]) -> dict[str, Run]:
    """What each mode gives in which the network runs, from the same start: others are in error by themselves."""
    runs: dict[str, Run] = {}
    twin = copy.deepcopy(model)
    for mode in MODES:
        with contextlib.suppress(*_OWN_ERRORS):
            if mode in modes:
                runs[mode] = run(twin, images, mode)
        if mode not in runs:  # counters may have been counted on half-way
            twin = copy.deepcopy(model)
    return runs


def _error(model: nn.Module, images: Tensor, mode: str) -> str:
    try:
        run(copy.deepcopy(model), images, mode)
    except _OWN_ERRORS as error:
        return f'{type(error).__name__}: {error}'
    return ''


def _leaks(plan: sem_timm.Plan, base: nn.Module, images: Tensor) -> bool:
    """Whether a block with a site on its output returns it twice or returns its input.

    Then the gradients of all that read it are summed in another order, and are not equal bit for bit.
    """
    found: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        first, *others = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in leaves([*args, *kwargs.values()]) if isinstance(leaf, Tensor)]
        found.append(any(first is other for other in (*others, *given)))

    for site in plan:
        if site.position == 'output':
            base.get_submodule(site.name).register_forward_hook(look, with_kwargs=True)
    for training in (False, True):
        with torch.no_grad(), contextlib.suppress(*_OWN_ERRORS):
            base.train(training)(images)
    return any(found)


def run(model: nn.Module, images: Tensor, mode: str) -> Run:
    """A forward and, if anything has a gradient, a backward, from the same random state."""
    model.train(mode == 'train')
    for parameter in model.parameters():
        parameter.grad = None
    images = images.clone().requires_grad_(mode not in ('no_grad', 'frozen'))
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    frozen = [p for p in model.parameters() if p.requires_grad] if mode == 'frozen' else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(mode != 'no_grad'):
            outputs = list(leaves(model(images)))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    losses = [
        (out.double() * torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)).sum()
        for out in outputs
        if isinstance(out, Tensor) and out.requires_grad
    ]
    if losses and mode != 'frozen':
        torch.stack(losses).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    return Run(outputs, {'images': images.grad, **gradients}, buffers, dict(attributes_of(model)), states)


def leaves(value: Any) -> Iterator[Any]:
    """The parts of an output with the types of what holds them, dataclasses included."""
    if isinstance(value, (tuple, list)):
        yield type(value).__name__
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from leaves(entry)
    elif is_dataclass(value):
        yield type(value).__name__
        for part in fields(value):
            yield from leaves(getattr(value, part.name))
    else:
        yield value


def attributes_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Counters, logs and caches: what a forward may have changed beside buffers."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if not key.startswith('_') and key != 'training':
                if isinstance(value, (list, dict, set)):
                    value = repr(value)
                yield f'{name}.{key}', value.detach().clone() if isinstance(value, Tensor) else value


def assert_equal_runs(first: Run, second: Run, where: str, leaky: bool = False) -> None:
    """Fails with the name of what differs; ``leaky`` leaves gradients the error of another order of summation."""
    assert len(first.outputs) == len(second.outputs), where
    for number, (one, other) in enumerate(zip(first.outputs, second.outputs)):
        assert same(one, other), f'{where}: output {number}'
        if isinstance(one, Tensor):
            alike = [[t.is_contiguous(), _is_channels_last(t)] for t in (one, other)]
            assert alike[0] == alike[1], f'{where}: output {number} lies differently in memory'
    largest = max((float(g.abs().max()) for g in first.gradients.values() if g is not None), default=0.0)
    for kind in ('gradients', 'buffers', 'attributes'):
        expected, got = getattr(first, kind), getattr(second, kind)
        for name, value in expected.items():
            assert name in got, f'{where}: {kind} {name} is gone'
            close = leaky and kind == 'gradients' and value is not None and _close(value, got[name], largest)
            assert same(value, got[name]) or close, f'{where}: {kind} {name}'
    assert same(first.random_states[0], second.random_states[0]), f'{where}: random state'
    assert first.random_states[1:] == second.random_states[1:], f'{where}: random state'


def same(first: Any, second: Any) -> bool:
    """Bit for bit, NaN being NaN."""
    if isinstance(first, Tensor):
        if not isinstance(second, Tensor) or first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(first, second) or torch.equal(first.nan_to_num(), second.nan_to_num())
    return type(first) is type(second) and bool(first == second)


def _close(first: Tensor, second: Tensor, largest: float) -> bool:
    return torch.allclose(first, second, rtol=1e-3, atol=1e-5 * largest)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _check_layouts(plan: sem_timm.Plan, network: Network) -> None:
    for site in plan:
        layout = network.layouts.get(site.class_name)
        if layout is not None:
            expected = {'NCHW': ('NCHW', 1), 'NHWC': ('NHWC', -1), 'NLC': ('NLC', -1)}[layout]
            assert (site.layout, site.channel_dim) == expected, site


# Other batches and other sizes than the plan has seen, each with a mode.
OTHERS = (((1, 3, 8, 8), 'eval'), ((3, 3, 8, 8), 'train'), ((2, 3, 12, 10), 'no_grad'), ((1, 3, 6, 14), 'eval'))


def _check_another_shape(network: Network, model: nn.Module, other: tuple[Any, str], leaky: bool) -> int:
    """Another shape gives what the base gives, or a `GuardError`; returns the number of those."""
    shape, mode = other
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    try:
        expected = run(network.build(), images, mode)
    except _OWN_ERRORS:
        return 0
    try:
        got = run(copy.deepcopy(model), images, mode)
    except GuardError:
        return 1
    except RuntimeError as error:
        if _LATE in str(error):
            return 0
        raise
    assert_equal_runs(expected, got, f'{mode} at {shape}', leaky)
    return 0


def _check_sites_act(model: nn.Module, plan: sem_timm.Plan, images: Tensor) -> None:
    """Each new module changes what its block returns once it is trained."""
    model.eval()
    for site in plan:
        before = _outputs(model, site.name, images)
        prefix = f'{site.name}.{site.attribute}.'
        own = {name: p for name, p in inserted(model).items() if name.startswith(prefix)}
        assert own, site
        changed = not before  # a module that runs only where nothing has a gradient, as in the plan
        for std in (0.1, 0.01, 1.0):  # a gate may be saturated where activations are large
            for parameter in own.values():
                nn.init.normal_(parameter, std=std)
            changed |= not all(map(same, before, _outputs(model, site.name, images)))
        assert changed, f'{prefix[:-1]} changes nothing'


def _outputs(model: nn.Module, name: str, images: Tensor) -> list[Any]:
    """What one block of the model returns."""
    seen: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.extend(leaves(out)))
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    with torch.no_grad():
        model(images)
    handle.remove()
    return [value.clone() if isinstance(value, Tensor) else value for value in seen]
