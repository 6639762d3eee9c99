"""What a core's queries, keys and masks say: where they come from, which axis is which, what may be passed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from sem_timm.surgery.graphs import ancestors
from sem_timm.surgery.layout import layout_of
from sem_timm.surgery.placement import Refused
from sem_timm.surgery.plan import Swap
from sem_timm.surgery.reading import Reading
from sem_timm.surgery.swap.axes import changes_along_axes
from sem_timm.surgery.swap.cores import Core


def check_sources(core: Core, values: dict[fx.Node, Any]) -> None:
    """Raises Refused unless the queries come from the same data as keys and values."""
    query, others = (_data_arguments(nodes, values) for nodes in ([core.query], [core.key, core.value]))
    if not query:
        raise Refused("its queries are not computed from the module's input")
    if not query & others:
        names = ', '.join(sorted(query))
        raise Refused(f"its queries are not computed from the module's input but from {names}")


def _data_arguments(nodes: list[fx.Node], values: dict[fx.Node, Any]) -> set[str]:
    """Names of the arguments that carry data into nodes."""
    return {str(node.target) for node in ancestors(nodes, values) if node.op == 'placeholder'}


def heads_of(core: Core, module: nn.Module, values: dict[fx.Node, Any]) -> tuple[int, int]:
    """Number of heads and their axis, from the end; 1 where they are folded into the batch or there is one."""
    query: Tensor = values[core.query]
    if query.ndim < 2:
        raise Refused(f'its queries are {tuple(query.shape)}, which has no tokens')
    try:
        changes = [changes_along_axes(core.query, module, values, counted) for counted in ('channel', 'batch')]
    except Exception as error:
        raise Refused(f'the axes of its queries could not be told apart: {error}') from error
    tokens, last = query.ndim - 2, query.ndim - 1
    # A single change along the tokens is a seam, as between a class token and those with rotary embeddings.
    seam = 1 if query.shape[tokens] > 2 else 0
    channels, samples = (
        {axis for axis, count in enumerate(counts) if count > (seam if axis == tokens else 0)} for counts in changes
    )
    if tokens in samples:
        raise Refused('it attends over the batch, not over tokens')
    if tokens in channels:
        raise Refused('it attends over channels, not over tokens')
    if query.shape[-2] == 1:
        raise Refused('it has a single query token, for which a softmax over tokens is constant')
    if last not in channels and query.shape[-1] > 1:
        raise Refused('the channels of its queries could not be told from their tokens')
    heads = [axis for axis in channels if axis < tokens]
    if len(heads) != 1 or heads[0] in samples:
        return 1, -3
    return int(query.shape[heads[0]]), heads[0] - query.ndim


def passes_mask(core: Core, values: dict[fx.Node, Any], operation: Swap) -> bool:
    """Whether the core's mask is an argument of the module that the new core is handed."""
    if len(core.extras) != 1 or values[core.extras[0]] is not None:
        data = [extra for extra in core.extras if _is_user_mask(extra, core, values)]
        if data and not operation.takes_pairwise_mask:
            shape = tuple(values[data[0]].shape)
            if len(shape) < 2 or shape[-2] != 1:
                raise Refused(f'it is called with a mask {shape} for pairs of tokens, which {operation} cannot honour')
        return bool(data) and len(core.extras) == 1
    return core.extras[0].op == 'placeholder'


def _is_user_mask(extra: fx.Node, core: Core, values: dict[fx.Node, Any]) -> bool:
    """Whether something added to the logits is data of its own, not a bias computed from queries or parameters."""
    given = _data_arguments([extra], values)
    return bool(given - _data_arguments([core.query, core.key], values))


def grid_of(reading: Reading, tokens: int) -> tuple[int, int] | None:
    """Height and width of the token grid, where the arguments of the module tell."""
    for value in reading.trace.values.values():
        pairs = [tuple(value)] if isinstance(value, (tuple, list)) else []
        layout = layout_of(value)
        if layout is not None and isinstance(value, Tensor) and value.ndim == 4:
            pairs.append(tuple(value.shape[2:]) if layout.channel == 1 else tuple(value.shape[1:3]))
        for pair in pairs:
            if len(pair) == 2 and all(isinstance(size, int) for size in pair) and pair[0] * pair[1] == tokens:
                return pair
    return None
