"""Whole attention modules as sites, where one maps (B, N, C) to (B, N, C) by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sem_timm.meta.layout import is_learned, layout_of
from sem_timm.meta.probing import Call
from sem_timm.meta.skeleton import filled
from sem_timm.random_state import preserved_random_state
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.arguments import forward_signature
from sem_timm.surgery.graphs import Values
from sem_timm.surgery.placement import Placement, free_names, written
from sem_timm.surgery.reading import Reader, Reading, bound_arguments
from sem_timm.surgery.sites import AttentionSite, Refused, Swap
from sem_timm.surgery.swap.cores import Core
from sem_timm.surgery.swap.edit import SwappedGraphs, calling, guards_for_unread
from sem_timm.surgery.swap.terms import CAUSAL, mask_of
from sem_timm.surgery.trace import Trace
from sem_timm.surgery.trial import try_swap


@dataclass(frozen=True)
class WholeSite(AttentionSite):
    """One attention module that is replaced as a whole.

    Attributes:
        attn_drop: Rate of its dropout of attention weights.
        proj_drop: Rate of its dropout of outputs.
    """

    attn_drop: float = 0.0
    proj_drop: float = 0.0


def place_whole(reader: Reader, operation: Swap, name: str, other_case: Callable[..., Any]) -> Placement:
    """Replaces all that an attention module computes by one new child.

    Raises:
        Refused: If it does more, or other things, than the new child would.
    """
    module, call = reader.modules[name], reader.probe.calls[name]
    if reader.holds_residual(name):
        raise Refused('it is a block, of which the attention is only a part')
    values = bound_arguments(module, call)
    _check_contract(values, call)
    (attribute,) = free_names(module, operation.attribute)
    first: Tensor = next(iter(values.values()))
    shape, heads = tuple(first.shape), getattr(module, 'num_heads', 1)
    # timm names the number of heads so; where it is none, one head is as good as any.
    num_heads = heads if isinstance(heads, int) and heads > 0 and shape[2] % heads == 0 else 1
    masked = 'attn_mask' in values
    site = WholeSite(
        name,
        type(module).__name__,
        attribute,
        shape,
        shape,
        shape,
        first.dtype,
        num_heads,
        masked=masked,
        attn_drop=_rate(module, 'attn_drop'),
        proj_drop=_rate(module, 'proj_drop'),
    )
    site = replace(site, num_parameters=try_swap(operation, site, values.get('attn_mask')))
    graph = calling(attribute, list(values), masked)
    trace = Trace(forward_signature(type(module)), values, {True: graph, False: graph}, (), frozenset())
    guards = tuple(guards_for_unread(Reading(trace, {}, {}), trace.graphs))
    guarded = replace(trace, guards=guards)
    edit = written(type(module), guarded, trace.graphs, other_case, (attribute,), 'core', operation)
    return Placement((site,), edit, None, SwappedGraphs({}, trace.graphs))


def check_terms(cores: list[Core], module: nn.Module, values: Values, operation: Swap) -> None:
    """Raises Refused if the logits of a module get a mask, or some other term, that nothing in its place is given."""
    for core in cores:
        mask = mask_of(core, module, values, operation)
        # The mask of the module is handed on under the name that timm gives it.
        if mask is not None and values[mask.node] is not None and str(mask.node.target) != 'attn_mask':
            shape = tuple(values[mask.node].shape)
            raise Refused(f'its logits get a mask {shape}, or another such term, that {operation} is not given')


def check_stored(module: nn.Module, call: Call) -> None:
    """Raises Refused if a module whose attention is not read holds, or is given, what may be a mask."""
    tokens = call.output.shape[1]
    given = tensors_in((call.args, call.kwargs))
    for value in (*module.buffers(), *(each for each in given if layout_of(each) is None)):
        is_index = not value.is_floating_point() and value.dtype != torch.bool
        if tuple(value.shape[-2:]) == (tokens, tokens) and not is_index and not is_learned(value):
            raise Refused(f'its attention is not read, and a tensor {tuple(value.shape)} in it may be a mask')


def check_order(module: nn.Module, call: Call) -> None:
    """Raises Refused if tokens do not see those after them, which is tried in numbers, or those before them."""
    generator = torch.Generator().manual_seed(0)

    def numbers(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype)
        # Small ones, so that every weight of a softmax shows in double precision.
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * 0.01

    given: Any = tree_map_only(Tensor, numbers, (call.args, call.kwargs))
    tokens = tensors_in(given)[0]
    tried = filled(module, generator).double()
    outputs = []
    try:
        with torch.no_grad(), preserved_random_state(on_gpus=False):
            for place in (None, 0, -1):
                kept = tokens.clone()
                if place is not None:
                    tokens[:, place] += 1.0
                outputs.append(tried(*given[0], **given[1]))
                tokens.copy_(kept)
    except Exception as error:
        raise Refused(f'whether its attention is causal could not be tried: {error}') from error
    plain, first, last = outputs
    if torch.equal(plain[:, 0], last[:, 0]) != torch.equal(plain[:, -1], first[:, -1]):
        raise Refused(CAUSAL)


def _check_contract(values: dict[str, Any], call: Call) -> None:
    # What takes the place of a whole module sees tokens, and perhaps a mask of them, and nothing else.
    first, *others = values.items()
    layout = layout_of(first[1])
    if layout is None or first[1].ndim != 3 or layout.channel != 2 or layout.batch != 0:
        raise Refused('its input is not (B, N, C)')
    if not isinstance(call.output, Tensor) or call.output.shape != first[1].shape:
        raise Refused('its output has not the shape (B, N, C) of its input')
    # A mask or a table of positions is no data; global queries of another stage are.
    data = [key for key, value in others if any(layout_of(leaf) is not None for leaf in tree_leaves(value))]
    if data:
        raise Refused(f'it is also given {data[0]}, which depends on the data')
    if values.get('is_causal') is True:
        raise Refused(CAUSAL)


def _rate(module: nn.Module, name: str) -> float:
    """The rate of a dropout that is named as timm names it; 0 where there is none."""
    dropout = getattr(module, name, None)
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
