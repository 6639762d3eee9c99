"""A rewritten forward against the original, in numbers, before it is used.

Both run on real tensors of the traced shapes, in the mode that the graph is for. The children, and methods that were
kept whole, are stand-ins that return numbers depending on what they were given, so the comparison costs a few
element-wise operations and needs no weights; the inserted modules stand in as identities. Results, and whatever the
forward did to its arguments and to the tensors that it read, must agree bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from sem_timm.errors import TraceError
from sem_timm.surgery.bytecode import names_called, names_called_by, surroundings
from sem_timm.surgery.graphs import own_methods_called
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.passing import Passing, passing_of_calls
from sem_timm.surgery.random_state import preserved_random_state, random_states
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.rewrite import Edit, patched_class
from sem_timm.surgery.skeleton import Call
from sem_timm.surgery.stand_in import Numbers, cloned, module_with_stand_ins, most_entries, returning_given, shell_of
from sem_timm.surgery.state import outline, plain


def verify(reading: Reading | None, module: nn.Module, call: Call, edit: Edit) -> None:
    """Compares the rewritten forward with that of the module's own class, in both modes where they differ.

    Raises:
        TraceError: If they compute different things, or one of them cannot be run by itself.
    """
    if reading is None:
        _check_output_edit(module, call, edit)
        return
    graphs = reading.trace.graphs
    passing = {mode: _passing(reading, module, mode) for mode in (False, True)}
    differ = graphs[True] is not graphs[False] or passing[True] != passing[False]
    # A forward that looks at its mode may do so where the trace did not get to.
    both = differ or 'training' in names_called(type(module))
    for training in (False, True) if both else (False,):
        try:
            same = _agree(reading, module, edit, training, passing[training])
            if training and same and (own := _own_by_mode(graphs[True], module)):
                # What they return in training was not seen; it may be what they are given.
                same = _agree(reading, module, edit, training, passing[training], own)
        except TraceError as error:
            raise TraceError(f'{_named(module)}: {error}') from error
        except Exception as error:  # the forward needs something of its children that stand-ins do not have
            raise TraceError(f'{_named(module)} cannot be checked by itself: {error}') from error
        if not same:
            raise TraceError(f'{_named(module)}: rewritten, it computes something else')


def _passing(reading: Reading, module: nn.Module, training: bool) -> dict[fx.Node, Passing]:
    graph, values = reading.trace.graphs[training], reading.values[training]
    return passing_of_calls(graph, module, values, reading.passing, training=training)


def _own_by_mode(graph: fx.Graph, module: nn.Module) -> set[str]:
    """The module's own methods that a graph calls and that ask for the mode."""
    return {name for name in own_methods_called(graph, module) if 'training' in names_called_by(type(module), name)}


def _check_output_edit(module: nn.Module, call: Call, edit: Edit) -> None:
    """Such a forward calls the old one, so running it once on meta tensors is enough to see that it fits."""
    stand_in = shell_of(module, patched_class(edit))
    stand_in.__dict__.update(dict.fromkeys(edit.inserted, _identity))
    try:
        with torch.no_grad(), LayoutMode():
            out = stand_in(*call.args, **call.kwargs)
    except Exception as error:
        raise TraceError(f'{_named(module)} does not run when it is called by another: {error}') from error
    shapes = [[leaf.shape for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (out, call.output)]
    if shapes[0] != shapes[1]:
        raise TraceError(f'{_named(module)} returns something else when it is called by another')


def _named(module: nn.Module) -> str:
    code = inspect.unwrap(type(module).forward).__code__
    return f'{type(module).__name__}.forward ({code.co_filename.rsplit("site-packages/", 1)[-1]}:{code.co_firstlineno})'


def _agree(
    reading: Reading,
    module: nn.Module,
    edit: Edit,
    training: bool,
    passing: Mapping[fx.Node, Passing],
    returning: Collection[str] = (),
) -> bool:
    """Whether both forwards compute the same; with stand-ins for methods in ``returning`` that return what they get."""
    trace, values = reading.trace, reading.values[training]
    numbers = Numbers(most_entries([*values.values(), *trace.values.values()]))
    arguments = {name: numbers.like(value, index) for index, (name, value) in enumerate(trace.values.items())}
    results, drawn = [], []
    classes: tuple[Any, ...] = (edit.base, patched_class(edit))
    for cls in classes:
        stand_in, read = module_with_stand_ins(module, reading, cls, training, numbers, passing)
        stand_in.__dict__.update({name: returning_given(stand_in.__dict__[name]) for name in returning})
        stand_in.__dict__.update(dict.fromkeys(edit.inserted, _identity))
        given = {name: cloned(value) for name, value in arguments.items()}
        with torch.no_grad(), preserved_random_state(on_gpus=False):
            torch.default_generator.manual_seed(0)  # of the CPU only; torch.manual_seed would reach the GPUs too
            before = _outlines(stand_in, edit.base)
            results.append((cls.forward(stand_in, **given), given, read, numbers.calls()))
            drawn.append(random_states())
            _check_unchanged(before, _outlines(stand_in, edit.base))
    return drawn[0] == drawn[1] and _equal(*results)


def _outlines(module: nn.Module, cls: type) -> dict[str, Any]:
    """What a forward might change beside tensors: its attributes, those of its children, and what it sees outside."""
    inside = {f'self.{name}': value for name, value in outline(module).items()}
    return {**inside, 'what is outside of its module': [plain(value) for value in surroundings(cls)]}


def _check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [name for name, value in after.items() if before.get(name, value) != value]
    if changed:
        raise TraceError(f'it changes {changed[0]}, which a graph cannot show')


def _identity(x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
    if shortcut is None:
        return x.clone()  # a new tensor, as of any module, so that a change in place shows
    return shortcut + x if shortcut_first else x + shortcut


def _equal(first: Any, second: Any) -> bool:
    one, one_form = tree_flatten(first)
    other, other_form = tree_flatten(second)
    return one_form == other_form and all(map(_equal_leaves, one, other))


def _equal_leaves(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and _equal_numbers(first, second)
    return type(first) is type(second) and bool(first == second)


def _equal_numbers(first: Tensor, second: Tensor) -> bool:
    if torch.equal(first, second):
        return True
    return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
