"""Where the factor of each inserted module would go, in a model as it is patched: without numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sem_timm.errors import ModelError, TraceError
from sem_timm.meta.skeleton import weightless
from sem_timm.plain import PLAIN_TENSORS
from sem_timm.surgery.factor.scope import Multiplied, NoPlace, Wanted
from sem_timm.surgery.factor.walk import Walk
from sem_timm.surgery.freeze import check_not_compact
from sem_timm.surgery.patch import PatchedModule, patched_modules
from sem_timm.surgery.reading import Reader, Reading, reading_of
from sem_timm.surgery.residual import last_of_each_output
from sem_timm.surgery.rewrite import edit_of, put_back
from sem_timm.surgery.sites import Site


@dataclass(frozen=True)
class FactorPlace:
    """Where a constant factor per channel, by which an inserted module would multiply, can go instead.

    Attributes:
        module: Name of the patched module.
        attribute: Name of the inserted child.
        parameters: What is multiplied; empty if it can go nowhere.
        reason: Why it cannot.
    """

    module: str
    attribute: str
    parameters: tuple[Multiplied, ...] = ()
    reason: str = ''

    @property
    def biases(self) -> tuple[Multiplied, ...]:
        """Those of the parameters that a shift is added to, one for each channel; empty if some channel has none."""
        chosen: list[Multiplied] = []
        stop = 0
        while starting := [each for each in self.parameters if each.is_bias and each.start == stop]:
            chosen.append(max(starting, key=lambda each: each.stop))  # of several terms of a sum, one
            stop = chosen[-1].stop
        return tuple(chosen) if stop == max((each.stop for each in self.parameters), default=0) else ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that hold the parameters; of a module's own parameter, its own name."""
        names = [parameter.name.rpartition('.') for parameter in self.parameters]
        plain = ('weight', 'bias')
        return tuple(dict.fromkeys(path if key in plain else f'{path}.{key}' for path, _, key in names))

    @property
    def kind(self) -> str:
        """What they are parameters of, such as 'batch norm'."""
        return ' + '.join(dict.fromkeys(parameter.kind for parameter in self.parameters))


def factor_places(model: nn.Module) -> Iterator[FactorPlace]:
    """Finds where a constant factor per channel of each inserted module can go, on a weightless copy of the model.

    Args:
        model: A patched model, which may be on the meta device.

    Yields:
        One place for each child that was inserted, swaps of attention left out.
    """
    parts = [part for part in patched_modules(model) if part.position != 'core']
    if not parts:
        return
    skeleton = weightless(model)
    closed = _without_insertions(skeleton)
    with reading_of(skeleton, tuple(parts[0].input_size) or None) as reader:
        finder = _Finder(model, reader, closed)
        for part in parts:
            for attribute in part.inserted:
                yield finder.place(part, attribute)


def _without_insertions(skeleton: nn.Module) -> dict[str, str]:
    """Takes out of a weightless copy what was inserted; returns the modules that no walk may enter, with the reasons.

    What comes behind a core is as before it was swapped, and so read from the module's own class. That a whole module
    has been replaced, or lost what its old forward reads, cannot be seen there.
    """
    closed = {}
    try:
        check_not_compact(skeleton)
        is_whole = True
    except ModelError:
        is_whole = False
    for part in patched_modules(skeleton):
        module = skeleton.get_submodule(part.name)
        edit = edit_of(module)
        assert edit is not None
        if part.position != 'core':
            closed[part.name] = f'{part.name} has a module inserted itself'
        elif not is_whole or getattr(part.operation, 'replaces_module', True):
            closed[part.name] = f'{part.name} has {part.operation} in place of its self-attention'
            continue
        put_back(module, edit)
    return closed


class _Finder:
    """Finds places in one model."""

    def __init__(self, model: nn.Module, reader: Reader, closed: dict[str, str]) -> None:
        self.model = model
        self.reader = reader
        self.closed = closed
        held = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        # By every name that it has.
        self.tied = {name for name, p in model.named_parameters(remove_duplicate=False) if held[id(p)] > 1}

    def place(self, part: PatchedModule, attribute: str) -> FactorPlace:
        """The place of the factor of one inserted child."""
        site = next((site for site in part.sites if site.attribute == attribute), None)
        if not isinstance(site, Site):
            return FactorPlace(part.name, attribute, reason='nothing was noted of its site')
        try:
            return FactorPlace(part.name, attribute, self._parameters(part, site))
        except NoPlace as reason:
            return FactorPlace(part.name, attribute, reason=str(reason))

    def _parameters(self, part: PatchedModule, site: Site) -> tuple[Multiplied, ...]:
        if self.reader.probe.counts.get(part.name, 0) != 1:
            raise NoPlace('its block is called more than once, or not at all')
        try:
            self.reader.read(part.name)
        except TraceError as error:
            return self._of_unread(part, site, error)
        failure = NoPlace('')
        for reading in self._readings(part.name):
            walk = Walk(self.reader, self.closed)
            try:
                found, in_training = (self._in_mode(walk, part, site, reading, mode) for mode in (False, True))
            except NoPlace as reason:
                failure = reason
                continue
            if set(found) != set(in_training):
                raise NoPlace('in training its branch ends in another layer than in eval mode')
            self._check(walk, found, f'{part.name}.{site.attribute}')
            return tuple(dict.fromkeys(found))
        raise failure

    def _of_unread(self, part: PatchedModule, site: Site, error: TraceError) -> tuple[Multiplied, ...]:
        """The parameters of a module that is not read, and may be a norm."""
        module, walk = self.reader.modules[part.name], Walk(self.reader, self.closed)
        unread = NoPlace(f'its block is not read: {error}')
        if part.position != 'output' or module._modules:
            raise unread from error
        try:
            found = walk.unread_norm(part.name, module, Wanted(0, 0, site.channels))
        except NoPlace as reason:
            raise unread from reason
        self._check(walk, found, f'{part.name}.{site.attribute}')
        return tuple(found)

    def _readings(self, name: str) -> Iterator[Reading]:
        yield self.reader.read(name)
        try:
            yield self.reader.read_with(name, inline_methods=True)
        except TraceError:  # what ended the walk through the first one is told
            return

    def _in_mode(
        self, walk: Walk, part: PatchedModule, site: Site, reading: Reading, training: bool
    ) -> list[Multiplied]:
        scope = walk.scope(part.name, reading, training)
        axis = site.channel_dim % len(site.shape)
        if part.position == 'output':
            several = type(self.reader.probe.calls[part.name].output) in (tuple, list)
            return walk.output(scope, axis, site.channels, first=several)
        adds = reading.adds[training]
        if getattr(part.operation, 'branches', 'last') == 'last':
            adds = last_of_each_output(scope.graph, adds)
        if len(adds) != len(part.inserted):
            raise NoPlace('its block is read otherwise than when it was patched')
        add = adds[part.inserted.index(site.attribute)]
        return walk.value(scope, add.branch, axis, site.channels, None if add.partial else add.add)

    def _check(self, walk: Walk, found: list[Multiplied], inserted: str) -> None:
        """Refuses parameters that others read, and modules that are more than their class, such as the inserted one."""
        names = [parameter.name for parameter in found]
        tied = next((name for name in names if name in self.tied), None)
        if tied is not None:
            raise NoPlace(f'{tied} is shared with another layer')
        if len(set(names)) < len(names):
            raise NoPlace('one layer would take the factor twice')
        live = dict(self.model.named_modules())
        held_by = [name.rpartition('.')[0] for name in names]
        for name in dict.fromkeys([inserted.lstrip('.'), *walk.through, *held_by]):
            module = live[name]
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if any(hooks) or 'forward' in module.__dict__:
                raise NoPlace(f'{name} has hooks, or a forward of its own')
        for name in names:
            if type(self.model.get_parameter(name)) not in PLAIN_TENSORS:
                raise NoPlace(f'{name} is no plain tensor')
