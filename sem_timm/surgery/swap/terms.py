"""What becomes of each term of an attention's logits: it goes, it is handed on as a mask, or the swap is refused.

A position bias goes with the old core: the new one learns anew where tokens are. It is made of parameters, perhaps of
products of queries with them, and of nothing else. So does a mask of windows, which the new core forms no pairs for.
All else, whether it is given, fixed or computed from the data, says what a token may look at. For example, of

    attention = q @ k.mT * self.scale + self.table[self.index]             # a position bias
    attention = attention.masked_fill(torch.ones_like(attention).triu(1) > 0, float('-inf'))

the new core is handed the mask of the second line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod

from torch import Tensor, fx, nn

from sem_timm.meta.layout import is_learned, layout_of
from sem_timm.meta.vocabulary import KEEPS_PLACES, Kind, kind_of
from sem_timm.surgery.aliasing import Memory
from sem_timm.surgery.bytecode import names_called_by
from sem_timm.surgery.effects import writes_in
from sem_timm.surgery.equivalents.windows import mask_of_windows
from sem_timm.surgery.graphs import Values, called_module, is_data, read_by
from sem_timm.surgery.sites import Refused, Swap
from sem_timm.surgery.swap.cores import Core, Extra

CAUSAL = 'its attention is causal: a token sees only those before it'


def mask_of(core: Core, module: nn.Module, values: Values, operation: Swap) -> Extra | None:
    """What of a core's extras the new core is handed as its mask.

    Args:
        core: The core.
        module: The module it is in.
        values: The value of every node.
        operation: The operation.

    Raises:
        Refused: If there are several masks, or one that the operation cannot honour.
    """
    if core.is_causal:
        raise Refused(CAUSAL)
    terms = _Terms(core, module, values)
    for factor, _ in core.scale.factors:
        if not operation.reads_keys and terms.data_behind(factor):
            shape = tuple(getattr(values[factor], 'shape', ()))
            raise Refused(f'its logits are multiplied by numbers {shape} from the data, which {operation} would ignore')
    if len(core.extras) == 1 and values[core.extras[0].node] is None:  # a caller may give one another time
        return core.extras[0] if core.extras[0].node.op == 'placeholder' else None
    masks = [extra for extra in core.extras if not terms.may_go(extra)]
    for mask in masks:
        shape = tuple(values[mask.node].shape)
        is_pairwise = len(shape) < 2 or shape[-2] != 1
        if is_pairwise and not operation.takes_pairwise_mask:
            with_mask = 'it is called with a mask' if terms.data_behind(mask.node) else 'it has a fixed mask'
            raise Refused(f'{with_mask} {shape} for pairs of tokens, which {operation} cannot honour')
        if mask.how in ('within', 'otherwise'):
            raise Refused(f'it applies a mask {shape} in a way that is not read')
    if len(masks) > 1:
        raise Refused(f'it applies {len(masks)} masks; {operation} takes one')
    return masks[0] if masks else None


def loses_terms(core: Core, values: Values, mask: Extra | None) -> bool:
    """Whether a softmax would see a difference without the terms of a core that are not handed on as its mask."""
    # A child or function that adds to logits is not told apart further; what it adds is learned.
    return any(kind_of(step.node) is None for step in core.steps) or any(
        isinstance(values[extra.node], Tensor) and _is_seen(extra, values[extra.node])
        for extra in core.extras
        if extra is not mask
    )


def _is_seen(extra: Extra, value: Tensor) -> bool:
    # What is the same for all keys a softmax does not see.
    same_for_all = value.shape[-1] == 1 if value.ndim else True
    return value.numel() > 1 and not (extra.how in ('added', 'subtracted') and same_for_all)


class _Terms:
    """Tells what the terms of the logits of one core are made of."""

    def __init__(self, core: Core, module: nn.Module, values: Values) -> None:
        self.core, self.module, self.values = core, module, values
        self.memory = Memory(values)
        self.writes = writes_in(core.output.graph.nodes, module)
        self.queries = set(_as_they_come(core.query, values))

    def may_go(self, extra: Extra) -> bool:
        """Whether a term is of no use to a new core."""
        value = self.values[extra.node]
        if not isinstance(value, Tensor) or value.numel() == 1:
            return True
        if extra.how == 'within':
            return not self.data_behind(extra.node, self.queries)
        if not _is_seen(extra, value):
            return True
        if self._numbers_behind(extra.node, self.queries) != read_by([extra.node], self.queries):
            return False  # something is written into it
        return all(self._is_position(part) or self._is_window_mask(part, value) for part in self._summands(extra.node))

    def data_behind(self, node: fx.Node, stops: Collection[fx.Node] = ()) -> set[fx.Node]:
        """The arguments of the module whose data goes into the numbers of a node, other than by way of some stops."""
        found = self._numbers_behind(node, stops)
        return {each for each in found if each.op == 'placeholder' and is_data(self.values[each])}

    def _numbers_behind(self, node: fx.Node, stops: Collection[fx.Node] = ()) -> set[fx.Node]:
        found = read_by([node], stops)
        # What writes into it in place is not among what it is computed from: mask.triu_(1).
        while True:
            seen = [
                write
                for write, target in self.writes.items()
                if write not in found and any(self.memory.shared(target, each) for each in found)
            ]
            if not seen:
                return found
            found |= read_by(seen, stops)

    def _summands(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a term is summed up from, and masked by."""
        sources = [each for each in node.all_input_nodes if isinstance(self.values[each], Tensor)]
        kind = kind_of(node)
        sums = kind in (Kind.SUM, Kind.DIFFERENCE, Kind.MASK)
        if sources and (sums or (len(sources) == 1 and kind in _PASSES)):
            for source in sources:
                yield from self._summands(source)
        else:
            yield node

    def _is_position(self, part: fx.Node) -> bool:
        """Whether a part of a term is made of parameters, and of queries at most."""
        if self.values[part].numel() == 1:
            return True
        found = self._numbers_behind(part, self.queries)
        if any(each.op == 'placeholder' and is_data(self.values[each]) for each in found):
            return False
        # A layer that is given data computes something new of it; a table of positions is multiplied with queries.
        layers = (each for each in found if any(is_data(self.values[source]) for source in each.all_input_nodes))
        if any(kind_of(each) is Kind.LAYER or _has_layers(each, self.module) for each in layers):
            return False
        return any(is_learned(self.values[each]) or _reads_parameters(each, self.module) for each in found)

    def _is_window_mask(self, part: fx.Node, term: Tensor) -> bool:
        """Whether a part of a term is a mask for each of the windows that an image is divided into.

        It is stored, (windows, N, M), where the batch of the logits holds the windows of several images; or it is known
        to be made for them.
        """
        if part.target is mask_of_windows:
            return True
        value, batch = self.values[part], self.values[self.core.query].shape[0]
        if part.op not in ('placeholder', 'get_attr') or layout_of(value) is not None or is_learned(value):
            return False
        if value.ndim < 3 or not 1 < value.shape[0] < batch or batch % value.shape[0]:
            return False
        # One for each head stands on the axis of heads.
        return value.shape[-2:] == term.shape[-2:] and (
            prod(term.shape[:-3]) > 1 or self.values[self.core.query].ndim == 3
        )


# What hands numbers on, in another place or type.
_PASSES = (KEEPS_PLACES | {Kind.RESHAPE, Kind.PERMUTATION, Kind.INDEX}) - {Kind.PRODUCT, Kind.QUOTIENT}


def _as_they_come(query: fx.Node, values: Values) -> Iterator[fx.Node]:
    """Queries, and the same numbers before they were laid out, scaled or cast for the product."""
    while True:
        yield query
        sources = [each for each in query.all_input_nodes if isinstance(values[each], Tensor)]
        same = len(sources) == 1 and values[sources[0]].numel() == values[query].numel()
        if not same or kind_of(query) not in _PASSES | {Kind.PRODUCT, Kind.QUOTIENT}:
            return
        (query,) = sources


def _has_layers(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a child with weights in layers of torch."""
    called = called_module(node, module) if node.op == 'call_module' else None
    layers = () if called is None else called.modules()
    return any(layer._parameters and type(layer).__module__.startswith('torch.nn.') for layer in layers)


def _reads_parameters(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a child with parameters, or one of the module's own methods that mentions some."""
    if node.op != 'call_module':
        return False
    called = called_module(node, module)
    if called is not None:
        return next(called.parameters(), None) is not None
    mentioned = names_called_by(type(module), str(node.target))
    return bool(mentioned & {*module._parameters, *module._modules})
