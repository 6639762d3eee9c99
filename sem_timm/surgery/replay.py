"""The attention weights of a spelled-out core as they were read: from queries and keys, one step after the other.

What a forward does to its logits beside, such as ``logits.masked_fill_(mask, -inf)`` in a line of its own, is in what
the core returned and not in what is computed here, and so is found out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx.node import map_arg

from sem_timm.meta.vocabulary import Kind, kind_of
from sem_timm.surgery.graphs import Values

if TYPE_CHECKING:
    from sem_timm.surgery.swap.cores import Core
    from sem_timm.surgery.swap.scale import Step


def replayed(core: Core, values: Values, *, with_terms: bool) -> Tensor:
    """The attention weights (..., N, M) of a core, on numbers.

    Args:
        core: The core, not a call.
        values: The values of its queries and keys, and of all that its steps read.
        with_terms: Whether with what is added to the logits or masks them, or with their scale alone.
    """
    query, key = values[core.query], values[core.key]
    logits = products = query @ (key if core.key_transposed else key.mT)
    for step in core.steps:
        logits = _taken(step, logits, values, with_terms)
    return logits.reshape(products.shape).softmax(-1)


def _taken(step: Step, logits: Tensor, values: Values, with_terms: bool) -> Tensor:
    node, kind = step.node, kind_of(step.node)
    if not with_terms and kind in (Kind.SUM, Kind.DIFFERENCE, Kind.MASK, None):
        return -logits if step.negates else logits
    if node.op == 'call_module':  # a child that adds something
        return logits + (values[node] - values[step.logits])
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: logits if each is step.logits else values[each])
    if node.op == 'call_method':
        taken: Tensor = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        taken = node.target(*args, **kwargs)
    return taken
