"""What all operations ask of a module before they edit it, and what comes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx, nn

from sem_timm.surgery.bytecode import method_iterates_children
from sem_timm.surgery.graphs import own_methods_called
from sem_timm.surgery.reading import Reader, Reading
from sem_timm.surgery.rewrite import Edit, edit_of, patched_class
from sem_timm.surgery.sites import AttentionSite, Refused, Site
from sem_timm.surgery.source import graph_source
from sem_timm.surgery.trace import Trace

if TYPE_CHECKING:
    from sem_timm.surgery.swap.edit import SwappedGraphs
    from sem_timm.surgery.swap.original import Original
    from sem_timm.surgery.swap.rows import Rows


@dataclass(frozen=True)
class Placement:
    """One module's sites and the edit that makes them.

    Attributes:
        sites: The sites.
        edit: The edit.
        reading: What an edit of a graph was made from; None for an edit around the whole forward.
        swapped: How attention was edited; None for an insertion.
    """

    sites: tuple[Site | AttentionSite, ...]
    edit: Edit
    reading: Reading | None
    swapped: SwappedGraphs | None = None

    @property
    def graphs_after(self) -> dict[bool, fx.Graph]:
        """The edited graphs, of a swap."""
        return {} if self.swapped is None else self.swapped.graphs

    @property
    def attention_sites(self) -> tuple[AttentionSite, ...]:
        """The sites, of a swap."""
        return tuple(site for site in self.sites if isinstance(site, AttentionSite))


@dataclass(frozen=True)
class Rehearsal:
    """What it showed to apply all placements to the weightless copy and to run it once.

    Attributes:
        unread: Names of parameters that no longer reach the output.
        sliced: The rows that are read of packed weights, by name.
        computed: Names of modules that are still called though nobody reads their result, or all of it.
        originals: How the old attention is computed, by name of the module.
    """

    unread: list[str] = field(default_factory=list)
    sliced: dict[str, Rows] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    originals: dict[str, Original] = field(default_factory=dict)


class Placer(Protocol):
    """Places one operation in the modules of one probed model.

    Attributes:
        noun: What the modules are that it looks for.
    """

    noun: str

    @property
    def candidates(self) -> list[str]:
        """Their names."""

    def place(self, name: str) -> Placement:
        """Finds the sites of one module, or raises Refused."""

    def prove(self, name: str, placement: Placement) -> None:
        """Compares the edited forward with the original in numbers; raises TraceError if they differ."""

    def unreadable(self) -> dict[str, str]:
        """Modules that might have been candidates and whose forward could not be read, with the reasons."""

    def rehearse(self, placements: dict[str, Placement]) -> Rehearsal:
        """Looks at what all placements together change; the weightless copy may be used up by it."""


def check_methods(module: nn.Module, graph: fx.Graph) -> None:
    """Raises Refused if a method that a graph calls goes through the children, of which the new one would be one."""
    if any(method_iterates_children(type(module), name) for name in own_methods_called(graph, module)):
        raise Refused('a method of it goes through its children, and the new one would become one of them')


def check_editable(reader: Reader, name: str) -> None:
    """Raises Refused unless the forward of a module can be edited at all."""
    module, count = reader.modules[name], reader.probe.counts.get(name, 0)
    edit = edit_of(module)
    if edit is not None:
        raise Refused(f'it is already patched ({edit.operation}); unpatch_model(model) first')
    if count == 0:
        raise Refused("the model's forward does not call it")
    if count > 1:
        raise Refused(f"the model's forward calls it {count} times; one new module cannot serve several calls")
    if not isinstance(inspect.getattr_static(type(module), 'forward'), FunctionType):
        raise Refused('its forward is not a plain function')
    if 'forward' in module.__dict__:
        raise Refused('its forward was replaced on the instance, which hides that of its class')


def free_names(module: nn.Module, base: str, count: int = 1) -> tuple[str, ...]:
    """Names for new children that the module does not have yet."""
    names = [base] if count == 1 else [f'{base}{number}' for number in range(1, count + 1)]
    # A block may have a child of this name of its own: timm has an se in many.
    for index, name in enumerate(names):
        while hasattr(module, name):
            name += '_'
        names[index] = name
    return tuple(names)


def written(
    base: type, trace: Trace, graphs: dict[bool, fx.Graph], other_case: Callable[..., Any], *facts: Any
) -> Edit:
    """The edit that makes graphs the forward of a class, with the other facts of an `Edit`; or raises Refused.

    Calls that the graphs do not hold for are handed on to ``other_case``, see `sem_timm.surgery.cases`.
    """
    try:
        source, bindings = graph_source(trace, graphs, other_case)
    except SyntaxError as error:  # a child named by a keyword, say
        raise Refused(f'its forward cannot be written as code: {error}') from error
    return compiled(Edit(base, source, bindings, *facts))


def compiled(edit: Edit) -> Edit:
    """Makes the class of an edit now, so that what cannot be written as code is refused and not met later."""
    try:
        patched_class(edit)
    except Exception as error:  # odd names, a class that forbids subclasses
        raise Refused(f'no class can be made for it: {type(error).__name__}: {error}') from error
    return edit
