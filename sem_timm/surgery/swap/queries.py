"""What a core's queries, keys and masks say: where they come from, which axis is which, what may be passed on."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sem_timm.surgery.bytecode import names_called_by
from sem_timm.surgery.graphs import Values, ancestors, called_module, is_data
from sem_timm.surgery.sites import Refused, Swap
from sem_timm.surgery.swap.axes import changes_along_axes
from sem_timm.surgery.swap.cores import Core, Extra


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


def mask_of(core: Core, module: nn.Module, values: Values, operation: Swap, tables: set[int]) -> Extra | None:
    """What of a core's extras the new core is handed as its mask.

    That is what the caller gave, or what is fixed. What is learned is a bias of positions, and goes with the old core;
    so does a mask of windows, which logits are laid out anew for.

    Args:
        core: The core.
        module: The module it is in.
        values: The value of every node.
        operation: The operation.
        tables: Identities of the model's buffers, which a module may be handed.

    Raises:
        Refused: If there are several masks, or one that the operation cannot honour.
    """
    if len(core.extras) == 1 and values[core.extras[0].node] is None:
        return core.extras[0] if core.extras[0].node.op == 'placeholder' else None
    # Learned biases are neither given nor fixed: they say where tokens are, which the new core learns anew.
    given = [extra for extra in core.extras if _is_data_of_its_own(extra.node, core, values)]
    fixed = [extra for extra in core.extras if _is_fixed_mask(extra.node, core, module, values, tables)]
    masks = given + [extra for extra in fixed if extra not in given]
    for mask in masks:
        shape = tuple(values[mask.node].shape)
        is_pairwise = len(shape) < 2 or shape[-2] != 1
        if is_pairwise and not operation.takes_pairwise_mask:
            with_mask = 'it is called with a mask' if mask in given else 'it has a fixed mask'
            raise Refused(f'{with_mask} {shape} for pairs of tokens, which {operation} cannot honour')
        if mask.how == 'otherwise':
            raise Refused(f'it applies a mask {shape} in a way that is not read')
    if len(masks) > 1:
        raise Refused(f'it applies {len(masks)} masks; {operation} takes one')
    return masks[0] if masks else None


def _is_data_of_its_own(extra: fx.Node, core: Core, values: Values) -> bool:
    """Whether something added to the logits is data of its own, not a bias computed from queries or parameters."""
    given = _data_arguments([extra], values)
    return bool(given - _data_arguments([core.query, core.key], values))


def _is_fixed_mask(extra: fx.Node, core: Core, module: nn.Module, values: Values, tables: set[int]) -> bool:
    """Whether something added to logits is not learned, and says which token sees which."""
    value, shape = values[extra], (*values[core.query].shape[:-1], _num_keys(core, values))
    if is_data(value) or not isinstance(value, Tensor) or value.numel() == 1:
        return False
    # A mask of pairs broadcasts to the logits (..., N, M); a table that does not is something else, such as an index.
    if len(value.shape) > len(shape) or any(m not in (1, s) for m, s in zip(value.shape[::-1], shape[::-1])):
        return False
    return not any(_is_learned(node, module, values, tables) for node in _tables_behind(extra, values))


def _tables_behind(extra: fx.Node, values: Values) -> set[fx.Node]:
    """The nodes of tensors that do not derive from the model's input and that one is computed from."""
    found: set[fx.Node] = set()
    waiting = [extra]
    while waiting:
        node = waiting.pop()
        holds_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(values[node]))
        if node not in found and holds_tensors and not is_data(values[node]):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _num_keys(core: Core, values: Values) -> int:
    return int(values[core.key].shape[-1 if core.key_transposed else -2])


def _is_learned(node: fx.Node, module: nn.Module, values: Values, tables: set[int]) -> bool:
    """Whether a node brings in a parameter, or something from outside the module that may be computed from one."""
    if node.op == 'placeholder':
        value = values[node]
        is_table = id(value) in tables or id(getattr(value, '_base', None)) in tables
        return isinstance(value, Tensor) and value.is_floating_point() and not is_data(value) and not is_table
    if node.op == 'get_attr':
        return isinstance(attrgetter(str(node.target))(module), nn.Parameter)
    if node.op != 'call_module':
        return False
    child = called_module(node, module)
    if child is not None:
        return next(child.parameters(), None) is not None
    # One of its own methods: whatever parameter or child it mentions may be in what it returns.
    mentioned = names_called_by(type(module), str(node.target))
    return bool(mentioned & {*module._parameters, *module._modules})
