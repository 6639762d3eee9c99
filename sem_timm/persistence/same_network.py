"""Where in a model the network of a patch is: in a feature backbone under other names, or inside of a larger model.

in the file             in the model                  the network
layer1.0.conv1.weight   encoder.model.layer1.0.…      its part encoder.model
model.blocks.0.attn.…   blocks.0.attn.…               the model; the file is of a wrapper around it
stages.0.blocks.1.…     stages_0.blocks.1.…           the model, with names that timm has flattened
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from sem_timm.errors import PatchFileError
from sem_timm.persistence.fingerprint import is_compared
from sem_timm.persistence.parts import head_prefixes, new_prefixes, parts_of
from sem_timm.persistence.record import PatchRecord, SiteRecord
from sem_timm.persistence.save import base_of

MISSING = ('error', 'skip')


def network_of(model: nn.Module, record: PatchRecord, file: Path, missing: str) -> Network:
    """The part of a model that is the network of a patch, as the names of its tensors tell; not its class.

    Args:
        model: The model.
        record: What ``patch.json`` says.
        file: Its path, for messages.
        missing: What happens if the end of the network or the classifier is not there, and the patch has something
            for it: 'error', or 'skip' to leave that out.

    Raises:
        PatchFileError: If no part is, with the first difference; if several are; if something is missing.
    """
    networks = list(_candidates(model, record)) or [Network(model, '', '', record)]
    fitting = [network for network in networks if network.difference is None]
    # A wrapper and what it wraps are one network with two names; two encoders side by side are two.
    distinct = list({id(network.first_block): network for network in reversed(fitting)}.values())[::-1]
    if len(distinct) > 1 and fitting[0].path:  # none of them is the model itself
        listed = ', '.join(repr(network.path) for network in distinct[:4])
        raise PatchFileError(
            f'{file}: {len(distinct)} parts of this {type(model).__name__} are the network of the patch: {listed}.\n'
            f'  Choose one: load_patch(model, folder, prefix={fitting[0].path!r}).'
        )
    network = fitting[0] if fitting else max(networks, key=lambda network: network.num_matched)
    here, there = type(network.module).__name__, record.base.class_name
    # One architecture in one class may have been changed by hand; then its base weights are compared, and no more.
    architecture = base_of(network.module).architecture
    may_differ = here == there and architecture is not None and architecture == record.base.architecture
    if network.difference is not None and not may_differ:
        raise PatchFileError(
            f'{file}: the patch is for a {there!r}, and this {here!r} is not the same network: {network.difference}.'
        )
    network.leave_out(file, missing)
    return network


class Network:
    """The network of a patch in a model, and its patch in the names that it has there.

    Args:
        model: The model.
        path: Name of the part of the model that is the network; empty for the model itself.
        stripped: What the names in the file begin with and those in the network do not; empty, or with a dot at its
            end.
        record: What ``patch.json`` says.

    Attributes:
        module: The part of the model.
        path: Its name.
        record: The record with the names of the network.
        difference: The first difference between the base tensors of file and network, up to what only one of both has
            at its end; None without one.
        num_matched: How many base tensors both have.
    """

    def __init__(self, model: nn.Module, path: str, stripped: str, record: PatchRecord) -> None:
        self.module, self.path, self.record = model.get_submodule(path), path, record
        self._stripped = stripped
        self._modules = _Names(name for name, _ in self.module.named_modules(remove_duplicate=False))
        self._tensors = _Names(self.module.state_dict())
        self._missing: list[str] = []
        self._found: set[str] = set()
        self.difference, self.num_matched = self._compared()
        self._new_names: dict[str, str] = {}

    @property
    def first_block(self) -> nn.Module | None:
        """The module of the first site, if it is there."""
        name = self._modules.find(self.record.steps[0].sites[0].name.removeprefix(self._stripped))
        return None if name is None else self.module.get_submodule(name)

    def leave_out(self, file: Path, missing: str) -> None:
        """Gives the record the names of the network; raises PatchFileError for what is missing, or leaves it out."""
        sites = [site for step in self.record.steps for site in step.sites]
        gone = [site for site in sites if self._is_past_the_end(site)]
        head = [name for name, tensor in self.record.tensors.items() if tensor.part == 'head']
        headless = bool(head) and not parts_of(self.module).head and not any(map(self._tensor, head))
        what = [site.name for site in gone] + (['its classifier'] if headless else [])
        if len(gone) == len(sites) or (what and missing == 'error'):
            advice = (
                "  load_patch(model, folder, missing='skip') leaves that out."
                if len(gone) < len(sites)
                else '  Nothing of the patch is left for it.'
            )
            raise PatchFileError(
                f'{file}: this {type(self.module).__name__} lacks the end of the network, and the patch has values '
                f'there: for {", ".join(what)}.\n{advice}'
            )
        self._rename(tuple(gone), head if headless else [])

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file under the names of the network, without those that are left out."""
        return {self._new_names[name]: tensor for name, tensor in tensors.items() if name in self._new_names}

    def shared(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The base tensors of the network that the file knows too; all of them where it is not the same network."""
        return base if self.difference else {name: base[name] for name in base if name in self._found}

    def _compared(self) -> tuple[str | None, int]:
        """The first difference in names or shapes, and how many base tensors are there and here; notes which are."""
        new, head = new_prefixes(self.module), head_prefixes(self.module)
        state = self.module.state_dict()
        here = [name for name in state if is_compared(name) and not name.startswith((*new, *head))]
        known, difference = set(here), None
        of_base = {name: tensor for name, tensor in self.record.tensors.items() if tensor.part == 'base'}
        for told in (self.record.fingerprints, of_base):
            gone = ''
            for name in (name for name in told if is_compared(name) and name.startswith(self._stripped)):
                own = self._tensor(name)
                if own is None or own not in known:
                    gone = gone or name
                    self._missing.append(name)
                    continue
                self._found.add(own)
                if gone and difference is None:
                    difference = f'it has no tensor {gone!r}, and has {name!r}, which comes later'
                shape = tuple(state[own].shape)
                if difference is None and shape != told[name].shape and self._is_of_a_site(name):
                    difference = f'its {own} has the shape {shape}, and {told[name].shape} in the patch'
        last = max((number for number, name in enumerate(here) if name in self._found), default=-1)
        unknown = next((name for name in here[: max(last, 0)] if name not in self._found), None)
        if difference is None and unknown is not None:
            difference = f'its tensor {unknown!r} is not known to the patch'
        if not self._found and self._missing:
            difference = f'it has no tensor {self._missing[0]!r}'
        return difference, len(self._found)

    def _is_of_a_site(self, name: str) -> bool:
        """Whether a tensor is a weight or bias of a block with a site: its shape depends on no image size or channels.

        Position embeddings do, and so does the first layer.
        """
        path, _, last = name.rpartition('.')
        blocks = tuple(f'{site.name}.' for step in self.record.steps for site in step.sites)
        return last in ('weight', 'bias') and f'{path}.'.startswith(blocks)

    def _tensor(self, name: str) -> str | None:
        """The name in the network of a tensor of the base or the head."""
        return self._tensors.find(name.removeprefix(self._stripped))

    def _module(self, name: str) -> str:
        """The name in the network of a module; of one that is not there, the name in the file."""
        found = self._modules.find(name.removeprefix(self._stripped))
        return name if found is None else found

    def _is_past_the_end(self, site: SiteRecord) -> bool:
        return self.difference is None and any(name.startswith(f'{site.name}.') for name in self._missing)

    def _rename(self, gone: tuple[SiteRecord, ...], left_out: list[str]) -> None:
        record, sites = self.record, {}
        for site in (site for step in record.steps for site in step.sites):
            sites[f'{site.name}.{site.attribute}.'] = None if site in gone else self._module(site.name)
        for name, tensor in record.tensors.items():
            inserted = next((key for key in sites if tensor.part == 'new' and name.startswith(key)), None)
            if inserted is None:
                own = None if name in left_out else self._tensor(name) or name
            else:
                block, attribute = sites[inserted], inserted[:-1].rpartition('.')[2]
                own = None if block is None else _joined(block, attribute, name.removeprefix(inserted))
            if own is not None and not (tensor.part == 'base' and name in self._missing and self.difference is None):
                self._new_names[name] = own
        steps = [replace(s, sites=tuple(self._renamed(o) for o in s.sites if o not in gone)) for s in record.steps]
        prints = {self._tensor(n) or n: p for n, p in record.fingerprints.items() if not self._is_left_alone(n)}
        self.record = replace(
            record,
            steps=tuple(step for step in steps if step.sites),
            tensors={own: record.tensors[name] for name, own in self._new_names.items()},
            fingerprints=prints,
        )

    def _renamed(self, site: SiteRecord) -> SiteRecord:
        return replace(site, name=self._module(site.name))

    def _is_left_alone(self, name: str) -> bool:
        """Whether a base tensor of the file lies outside of the network, or past its end."""
        return self.difference is None and (name in self._missing or not name.startswith(self._stripped))


class _Names:
    """Names to find others by that differ in dots: timm's feature backbones write ``stages_0`` for ``stages.0``."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.by_spelling: dict[str, str | None] = {}
        for name in self.names:
            spelling = _spelling(name)
            self.by_spelling[spelling] = None if spelling in self.by_spelling else name

    def find(self, name: str) -> str | None:
        return name if name in self.names else self.by_spelling.get(_spelling(name))


def _spelling(name: str) -> str:
    return name.replace('_', '.')


def _joined(*names: str) -> str:
    return '.'.join(name for name in names if name)


def _candidates(model: nn.Module, record: PatchRecord) -> Iterator[Network]:
    """The parts of a model that have a module for the first site of a patch; the model itself first, if it has."""
    sites = [site.name for step in record.steps for site in step.sites]
    every = (*record.fingerprints, *record.tensors)
    modules = _Names(name for name, _ in model.named_modules())
    seen: set[tuple[str, str]] = set()
    for stripped in _leading(sites):
        is_wrapper = all(name.startswith(stripped) for name in every)
        first = _spelling(sites[0].removeprefix(stripped))
        for name, _ in model.named_modules():
            spelling = _spelling(name)
            if spelling != first and not spelling.endswith('.' + first):
                continue
            path = modules.find(spelling.removesuffix(first).removesuffix('.'))
            # A file of a larger model says which part of it was patched only to a model that is all of that part.
            if path is not None and (path, stripped) not in seen and (is_wrapper or not path):
                seen.add((path, stripped))
                yield Network(model, path, stripped, record)


def _leading(names: list[str]) -> Iterator[str]:
    """What the names of modules may have in front that the network itself does not: '', 'model.', and so on."""
    yield ''
    parts = names[0].split('.')[:-1]
    for number in range(1, len(parts) + 1):
        leading = '.'.join(parts[:number]) + '.'
        if not all(name.startswith(leading) for name in names):
            return
        yield leading
