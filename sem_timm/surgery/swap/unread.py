"""Parameters that no longer reach a model's output once its attention is swapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from sem_timm.meta.layout import layout_of
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.bytecode import names_called_by
from sem_timm.surgery.decisions import check
from sem_timm.surgery.graphs import read_by
from sem_timm.surgery.placement import Placement
from sem_timm.surgery.reading import Reader, bound_arguments
from sem_timm.surgery.swap.edit import unread_arguments


def unread_parameters(reader: Reader, placements: dict[str, Placement]) -> tuple[str, ...]:
    """Names of the parameters that were read before the placements are applied and are not afterwards.

    Args:
        reader: The reader of the probed model, whose skeleton is not patched.
        placements: The placements, by name of the module.
    """
    found: dict[str, None] = {}
    for name, placement in placements.items():
        module = reader.modules[name]
        before, after = _graphs_before(placement), placement.graphs_after
        names = [parameter for parameter, _ in module.named_parameters(remove_duplicate=False)]
        read = _read(module, names, after.values())
        # What no graph read before the swap either is none of its doing.
        dead = [parameter for parameter in names if parameter not in read]
        if before is not None:
            were_read = _read(module, names, before.values())
            dead = [parameter for parameter in dead if parameter in were_read]
        found.update(dict.fromkeys(f'{name}.{parameter}' for parameter in dead))
    parameters = dict(reader.probe.skeleton.named_parameters(remove_duplicate=False))
    # One that is shared may be read under another of its names.
    alive = {id(parameter) for name, parameter in parameters.items() if name not in found}
    return tuple(name for name in found if id(parameters[name]) not in alive)


def may_lose_others(reader: Reader, placements: dict[str, Placement]) -> bool:
    """Whether parameters may be lost that the forwards of the modules still read, or that are not theirs.

    So it may be if a module no longer reads an argument that is computed from parameters alone, or returns several
    tensors, such as the values beside its result, of which its parent perhaps uses one.
    """
    if any(len(tensors_in(reader.probe.calls[name].output)) > 1 for name in placements):
        return True
    tables = {id(buffer) for buffer in reader.probe.skeleton.buffers()}  # handed on as they are, as masks of windows
    for name, placement in placements.items():
        values = bound_arguments(reader.modules[name], reader.probe.calls[name])
        for argument in unread_arguments(values, placement.graphs_after):
            tensors = [leaf for leaf in tensors_in(values[argument]) if id(leaf) not in tables]
            if any(t.is_floating_point() and layout_of(t) is None for t in tensors):
                return True
    return False


def reached_parameters(model: nn.Module, inputs: Tensor) -> set[str]:
    """Names of the parameters of a weightless model that get a gradient from its output."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        output = model(inputs)
    waiting = [leaf.grad_fn for leaf in tensors_in(output) if leaf.grad_fn is not None]
    seen: set[Any] = set()
    variables: set[int] = set()
    while waiting:
        function: Any = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        if hasattr(function, 'variable'):
            variables.add(id(function.variable))
        waiting += [following for following, _ in function.next_functions if following is not None]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name for name, parameter in model.named_parameters() if id(parameter) in variables}


def computed_in_vain(module: nn.Module, graphs: Iterable[fx.Graph]) -> set[str]:
    """Names of the children and parameters that graphs compute with to read nothing of it but a shape or a type."""
    graphs = list(graphs)
    used = {str(node.target) for graph in graphs for node in graph.nodes if node.op in ('call_module', 'get_attr')}
    names = {name for name, _ in chain(module.named_modules(), module.named_parameters())}
    return (used - _reached(graphs)) & names


def _graphs_before(placement: Placement) -> dict[bool, fx.Graph] | None:
    return None if placement.reading is None else placement.reading.trace.graphs


def _reached(graphs: Iterable[fx.Graph]) -> set[str]:
    """Names of the children, methods and tensors whose numbers graphs read, not only their shapes or types."""
    # A check asks for a length or a number, never for what is in a tensor.
    ends = [node for graph in graphs for node in graph.nodes if not node.users and node.target is not check]
    return {str(node.target) for node in read_by(ends) if node.op in ('call_module', 'get_attr')}


def _read(module: nn.Module, names: list[str], graphs: Iterable[fx.Graph]) -> set[str]:
    """Which of a module's parameters its graphs read, those of the children and methods they call included."""
    called = _reached(graphs)
    in_methods = {name for target in called for name in _mentioned(module, target)}
    return {
        name
        for name in names
        if name.split('.')[0] in in_methods or any(name == t or name.startswith(f'{t}.') for t in called)
    }


def _mentioned(module: nn.Module, target: str) -> Iterator[str]:
    """Names that one of the module's own methods mentions, if the target is one."""
    if '.' not in target and target not in module._modules and callable(getattr(type(module), target, None)):
        yield from names_called_by(type(module), target)
