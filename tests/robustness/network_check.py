"""What must hold for any network: planned and patched, it computes what it computed, bit for bit, or it is refused."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm import GuardError, ModelError, OptionError, RefusedError
from tests.robustness.network_source import Network
from tests.robustness.runs import Run, assert_equal_runs, leaves, run, same
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
    'ssf': ('ssf', {}),
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
    except (RefusedError, ModelError, OptionError) as error:  # the last where it does not run on the meta device
        assert_same(before, snapshot(model))
        return Outcome('refused', reasons=(str(error),))
    assert_same(before, snapshot(model))
    _check_layouts(plan, network)
    sem_timm.unpatch_model(sem_timm.patch_model(model, plan))
    assert_same(before, snapshot(model), random_state=False)
    sem_timm.patch_model(model, plan)
    # External attention has its channels in another place, and a sum that is written into a view has a gradient in
    # another place than one that is not: sums of gradients have another order then.
    leaky = name == 'external2d' or _WRITES.search(network.source) is not None or _leaks(plan, network.build(), images)
    late = _check_runs(model, images, expected, leaky)
    guarded = _check_another_shape(network, model, OTHERS[turn % len(OTHERS)], leaky)
    _check_sites_act(model, plan, images)
    _check_undone(sem_timm.unpatch_model(model), network)
    positions = tuple(site.position for site in plan)
    return Outcome('patched', positions, tuple(refusal.reason for refusal in plan.refusals), guarded, late)


def _check_runs(model: nn.Module, images: Tensor, expected: dict[str, Run], leaky: bool) -> bool:
    """The patched network gives in each mode what its base gives; returns whether torch refused to differentiate."""
    got, late = _runs_of(model, images, expected), False
    for mode, its in expected.items():
        error = '' if mode in got else _error(model, images, mode)
        if _LATE in error:  # by a child that changes what it is given; torch tells
            late = True
            continue
        assert not error, f'{mode}: the base runs, and the patched network does not: {error}'
        assert_equal_runs(its, got[mode], mode, leaky)
    return late


def _check_undone(model: nn.Module, network: Network) -> None:
    fresh = network.build()
    assert [*fresh.state_dict()] == [*model.state_dict()]
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]


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
