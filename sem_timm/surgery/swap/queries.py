"""What a core's queries and keys say: where they come from, and which axis is which."""

from __future__ import annotations

from torch import Tensor, fx, nn

from sem_timm.surgery.graphs import Values, ancestors
from sem_timm.surgery.sites import Refused, Swap
from sem_timm.surgery.swap.axes import changes_along_axes
from sem_timm.surgery.swap.cores import Core


def check_sources(core: Core, values: Values, operation: Swap) -> None:
    """Raises Refused unless the queries come from the same data as keys and values, for as far as those are read."""
    query, others = (_data_arguments(nodes, values) for nodes in ([core.query], [core.key, core.value]))
    # GCViT hands its blocks global queries; those of a decoder come from other tokens than its keys do.
    names = ', '.join(sorted(query))
    if not query:
        raise Refused("its queries are not computed from the module's input")
    if not query & others:
        raise Refused(f'its queries are computed from {names}, its keys and values from other inputs')
    if others - query and not operation.reads_keys:
        more = ', '.join(sorted(others - query))
        raise Refused(f'its keys and values are also computed from {more}, which {operation} would not look at')


def _data_arguments(nodes: list[fx.Node], values: Values) -> set[str]:
    """Names of the arguments that carry data into nodes."""
    return {str(node.target) for node in ancestors(nodes, values) if node.op == 'placeholder'}


def heads_of(core: Core, module: nn.Module, values: Values) -> tuple[int, int]:
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
    # Channels that also change along an axis before the tokens are divided into heads along it.
    heads = [axis for axis in channels if axis < tokens]
    if len(heads) != 1 or heads[0] in samples:
        return 1, -3
    return int(query.shape[heads[0]]), heads[0] - query.ndim
