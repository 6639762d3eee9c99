"""One run of the weightless copy with all swaps applied, and what it shows: shapes that fit, parameters unread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sem_timm.errors import TraceError
from sem_timm.surgery.layout import LayoutMode
from sem_timm.surgery.placement import Aftermath, Placement
from sem_timm.surgery.plan import Swap
from sem_timm.surgery.reading import Reader
from sem_timm.surgery.rewrite import Edit, patched_class
from sem_timm.surgery.skeleton import Call
from sem_timm.surgery.swap.original import Original
from sem_timm.surgery.swap.tables import unread_tables
from sem_timm.surgery.swap.unread import may_lose_others, reached_parameters, unread_parameters


def rehearse_swap(reader: Reader, placements: dict[str, Placement], operation: Swap) -> Aftermath:
    """Applies placements to the weightless copy, which is used up by it, and runs it once.

    Raises:
        TraceError: If the model no longer runs, or returns other shapes.
    """
    skeleton, call = reader.probe.skeleton, reader.probe.calls['']
    images: Tensor = call.args[0]
    unread = unread_parameters(reader, placements)
    more = may_lose_others(reader, placements)
    before = reached_parameters(skeleton, images) if more else set()
    sliced, originals = {}, {}
    for name, placement in placements.items():
        module = reader.modules[name]
        sites: Any = placement.sites
        for site in sites:
            module.add_module(site.attribute, operation.build(site, torch.device('meta'), site.dtype).eval())
        module.__class__ = patched_class(placement.edit)
        sliced.update({f'{name}.{weight}': rows for weight, rows in placement.swapping.sliced.items()})
        graph = None if placement.reading is None else placement.reading.trace.graphs[False]
        originals[name] = Original(graph, placement.swapping.cores.get(False, {}))
    _check_run(skeleton, call, operation)
    tables: dict[str, Edit] = {}
    if more:
        lost = before - reached_parameters(skeleton, images)
        unread = tuple(name for name, _ in skeleton.named_parameters() if name in lost or name in unread)
        inside = tuple(f'{name}.' for name in placements)  # whose own forwards say what they still call
        others = {name for name in lost if not name.startswith(inside)}
        tables = unread_tables(skeleton, images, others, operation)
        for name, edit in tables.items():
            skeleton.get_submodule(name).__class__ = patched_class(edit)
        if tables:
            _check_run(skeleton, call, operation)
    return Aftermath(unread, sliced, originals, tables)


def _check_run(skeleton: nn.Module, call: Call, operation: Swap) -> None:
    try:
        with torch.no_grad(), LayoutMode():
            output = skeleton(*call.args)
    except Exception as error:
        raise TraceError(f'the model does not run with {operation}: {type(error).__name__}: {error}') from error
    if _shapes(output) != _shapes(call.output):
        raise TraceError(f'the model returns {_shapes(output)} with {operation}, and {_shapes(call.output)} before')


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
