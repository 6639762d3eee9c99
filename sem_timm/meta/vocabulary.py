"""What torch's operations do, said once: whoever reads graphs asks here.

All spellings of an operation share an entry: ``x + y``, ``torch.add(x, y)``, ``x.add_(y)`` and ``x += y`` are 'add'. An
operation that a new model uses is one entry more. For example

    *_words(Kind.PERMUTATION, 'adjoint', memory=SHARED, order=_last_two)

lets ``q @ k.adjoint()`` be read as a product of queries and keys, and carries the layout of ``k`` over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import fx, nn

from sem_timm.meta import layout_rules as rules
from sem_timm.meta import shapes


class Kind(Enum):
    """What an operation does to the numbers of its first operand."""

    SUM = auto()
    DIFFERENCE = auto()
    PRODUCT = auto()
    QUOTIENT = auto()
    MASK = auto()  # other numbers where a mask says so
    BOUND = auto()
    CAST = auto()  # another type or device
    COPY = auto()  # the same numbers, perhaps elsewhere in memory
    EXPANSION = auto()
    MAP = auto()  # each number by itself, not linearly
    RESHAPE = auto()
    PERMUTATION = auto()
    DIVISION = auto()  # into pieces along an axis
    INDEX = auto()  # one piece, or one of several tensors
    JOIN = auto()
    REDUCTION = auto()
    MATRIX_PRODUCT = auto()
    SOFTMAX = auto()
    ATTENTION = auto()
    DROPOUT = auto()
    LAYER = auto()  # multiplies by a weight that it is given
    NORM = auto()
    FILL = auto()  # numbers of its own, in the shape of the first operand
    LOOKUP = auto()  # asks for a size, a type, a device


# Whose memory a result is: its own, that of the first operand, or one or the other by type and layout in memory.
NEW, SHARED, EITHER = 'new', 'shared', 'either'

# What may stand between a product of queries and keys and its softmax, beside moves: it keeps each logit in its place.
KEEPS_PLACES = {Kind.SUM, Kind.DIFFERENCE, Kind.PRODUCT, Kind.QUOTIENT, Kind.MASK, Kind.BOUND, Kind.CAST, Kind.COPY}
KEEPS_PLACES |= {Kind.EXPANSION}
# What hands numbers on as they are, in another shape, order or number.
MOVES = {Kind.RESHAPE, Kind.PERMUTATION, Kind.DIVISION, Kind.INDEX}


@dataclass(frozen=True)
class Word:
    """What is known of one operation.

    Attributes:
        kind: What it does.
        memory: Whose memory its result is: NEW, SHARED or EITHER.
        layout: How it moves layouts.
        shape: Finds its result on the meta device without torch, or returns ``NotImplemented``.
        order: For a permutation, the old axis of each new one: ``order(ndim, args, kwargs)``.
        lends: Whether of its second tensor only the shape or type counts.
    """

    kind: Kind
    memory: str = NEW
    layout: rules.Rule = rules.inherited
    shape: Callable[..., Any] | None = None
    order: Callable[..., list[int]] | None = None
    lends: bool = False


def _words(kind: Kind, names: str, **facts: Any) -> Iterator[tuple[str, Word]]:
    """One word under several names."""
    if 'order' in facts:
        facts.setdefault('layout', rules.permuted_by(facts['order']))
    word = Word(kind, **facts)
    yield from ((name, word) for name in names.split())


def _as_permute_says(ndim: int, args: Any, kwargs: Any) -> list[int]:
    axes = kwargs.get('dims', args[1] if len(args) == 2 else args[1:])
    return [int(axis) % ndim for axis in ((axes,) if isinstance(axes, int) else axes)]


def _two_swapped(ndim: int, args: Any, kwargs: Any) -> list[int]:
    given = [*args[1:], *(kwargs[key] for key in ('dim0', 'dim1', 'axis0', 'axis1') if key in kwargs)]
    first, second = (int(axis) % ndim for axis in given[:2])
    return [{first: second, second: first}.get(axis, axis) for axis in range(ndim)]


def _last_two(ndim: int, args: Any, kwargs: Any) -> list[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]


def _some_moved(ndim: int, args: Any, kwargs: Any) -> list[int]:
    given = [*args[1:], *(kwargs[key] for key in ('source', 'destination') if key in kwargs)]
    moved, places = ([int(axis) % ndim for axis in ((g,) if isinstance(g, int) else g)] for g in given)
    order = [axis for axis in range(ndim) if axis not in moved]
    for place, axis in sorted(zip(places, moved)):
        order.insert(place, axis)
    return order


# By bare name, without the underscores of methods in place and of operators.
WORDS: dict[str, Word] = dict(
    (
        *_words(Kind.SUM, 'add iadd radd', shape=shapes.elementwise),
        *_words(Kind.SUM, 'maybe_add_mask'),  # timm's, for masks that may be None
        *_words(Kind.DIFFERENCE, 'sub isub rsub subtract', shape=shapes.elementwise),
        *_words(Kind.PRODUCT, 'mul imul rmul multiply', shape=shapes.elementwise),
        *_words(Kind.QUOTIENT, 'div truediv itruediv divide', shape=shapes.elementwise),
        *_words(Kind.MASK, 'masked_fill where'),
        *_words(Kind.BOUND, 'clamp clip', shape=shapes.clamped),
        *_words(Kind.CAST, 'to type float half double bfloat16 cpu cuda', memory=EITHER),
        *_words(Kind.CAST, 'type_as', memory=EITHER, lends=True),
        *_words(Kind.COPY, 'contiguous', memory=EITHER),
        *_words(Kind.COPY, 'detach data', memory=SHARED),
        *_words(Kind.COPY, 'clone'),
        *_words(Kind.EXPANSION, 'expand broadcast_to', memory=SHARED),
        *_words(Kind.EXPANSION, 'expand_as', memory=SHARED, lends=True),
        *_words(Kind.RESHAPE, 'view unflatten squeeze unsqueeze', memory=SHARED, layout=rules.reshaped),
        *_words(Kind.RESHAPE, 'reshape flatten ravel', memory=EITHER, layout=rules.reshaped),
        *_words(Kind.RESHAPE, 'view_as', memory=SHARED, layout=rules.reshaped, lends=True),
        *_words(Kind.RESHAPE, 'reshape_as', memory=EITHER, layout=rules.reshaped, lends=True),
        *_words(Kind.PERMUTATION, 'permute', memory=SHARED, order=_as_permute_says),
        *_words(Kind.PERMUTATION, 'transpose swapaxes swapdims', memory=SHARED, order=_two_swapped),
        *_words(Kind.PERMUTATION, 'movedim moveaxis', memory=SHARED, order=_some_moved),
        *_words(Kind.PERMUTATION, 'mT mH T H t', memory=SHARED, order=_last_two),
        *_words(Kind.DIVISION, 'chunk split split_with_sizes tensor_split', memory=SHARED, layout=rules.split),
        *_words(Kind.DIVISION, 'unbind', memory=SHARED, layout=rules.unbound),
        *_words(Kind.INDEX, 'getitem', memory=SHARED, layout=rules.indexed),  # by tensors it makes a new one
        *_words(Kind.INDEX, 'select', memory=SHARED, layout=rules.unbound),
        *_words(Kind.INDEX, 'narrow', memory=SHARED),
        *_words(Kind.INDEX, 'diagonal', memory=SHARED),
        *_words(Kind.JOIN, 'cat concat concatenate', layout=rules.concatenated, shape=shapes.joined),
        *_words(Kind.JOIN, 'stack', layout=rules.stacked, shape=shapes.stacked),
        *_words(Kind.INDEX, 'roll', layout=rules.inherited, shape=shapes.rolled),
        *_words(Kind.REDUCTION, 'mean sum', shape=shapes.reduced),
        *_words(Kind.MATRIX_PRODUCT, 'matmul', layout=rules.multiplied, shape=shapes.multiplied),
        *_words(Kind.MATRIX_PRODUCT, 'bmm', layout=rules.multiplied),
        *_words(Kind.MATRIX_PRODUCT, 'einsum baddbmm', layout=rules.unknown),
        *_words(Kind.SOFTMAX, 'softmax', shape=shapes.like_input),
        *_words(Kind.ATTENTION, 'scaled_dot_product_attention', shape=shapes.attended),
        *_words(Kind.DROPOUT, 'dropout', memory=EITHER),
        *_words(Kind.LAYER, 'linear', layout=rules.on_last_axis, shape=shapes.projected),
        *_words(Kind.LAYER, 'embedding bilinear', layout=rules.on_last_axis),
        *_words(Kind.LAYER, 'conv1d conv2d', layout=rules.on_axis_one, shape=shapes.convolved),
        *_words(Kind.LAYER, 'conv3d', layout=rules.on_axis_one),
        *_words(Kind.NORM, 'batch_norm', layout=rules.on_axis_one, shape=shapes.batch_normed),
        *_words(Kind.NORM, 'group_norm', layout=rules.on_axis_one, shape=shapes.like_input),
        *_words(Kind.NORM, 'instance_norm', layout=rules.on_axis_one),
        *_words(Kind.NORM, 'layer_norm rms_norm', layout=rules.of_layer_norm, shape=shapes.layer_normed),
        *_words(Kind.LAYER, 'lstm', shape=shapes.recurrent),
        *_words(Kind.NORM, 'normalize', shape=shapes.like_input),
        *_words(Kind.NORM, 'l2_normalize'),
        *_words(Kind.MAP, 'relu gelu silu hardswish hardsigmoid relu6 sigmoid tanh', shape=shapes.like_input),
        *_words(Kind.MAP, 'addcmul', shape=shapes.elementwise),
        *_words(Kind.FILL, 'zeros_like ones_like full_like empty_like rand_like randn_like'),
        *_words(Kind.FILL, 'new_zeros new_ones new_empty'),
        *_words(Kind.FILL, 'new_full', shape=shapes.filled),
        *_words(Kind.LOOKUP, 'size dim numel stride is_floating_point is_contiguous'),
    )
)

_IN_PLACE_OPERATORS = {'iadd', 'isub', 'imul', 'itruediv', 'ifloordiv', 'imod', 'ipow', 'imatmul', 'setitem'}
_OF_TORCH = ('torch', '_operator', 'builtins', 'timm')


def word_named(name: str) -> Word | None:
    """The word of a function, method, operator or attribute of this name, if it is known."""
    return WORDS.get(name.strip('_'))


def writes_by_name(name: str) -> bool:
    """Whether an operation overwrites its first operand, as far as the name tells: ``add_``, ``__iadd__``."""
    return (name.endswith('_') and not name.endswith('__')) or name.strip('_') in _IN_PLACE_OPERATORS


def operation_name(node: fx.Node) -> str:
    """The name of the method or function that a node calls, or of what it looks up."""
    return node.target if isinstance(node.target, str) else getattr(node.target, '__name__', '')


def word_of(node: fx.Node) -> Word | None:
    """The word of what a node calls or, for ``x.mT`` and the like, reads; None for children and foreign functions."""
    if node.target is getattr:
        return word_named(str(node.args[1])) if node.args[1] in _VIEWS_BY_ATTRIBUTE else WORDS['size']
    if node.op == 'call_method':
        return word_named(str(node.target))
    module = str(getattr(node.target, '__module__', '')).split('.')[0]
    return word_named(operation_name(node)) if node.op == 'call_function' and module in _OF_TORCH else None


_VIEWS_BY_ATTRIBUTE = ('T', 'mT', 'H', 'mH', 'data')


def kind_of(node: fx.Node) -> Kind | None:
    """What a node does, if it calls an operation that is known."""
    word = word_of(node)
    return None if word is None else word.kind


def looks_up(node: fx.Node) -> bool:
    """Whether a node asks for a shape or type and reads no data."""
    return kind_of(node) is Kind.LOOKUP


def order_of(node: fx.Node, ndim: int) -> list[int] | None:
    """For a permutation the old axis of each new one; None for other nodes, or where axes are not plain numbers."""
    word = word_of(node)
    if word is None or word.order is None or any(isinstance(entry, fx.Node) for entry in node.all_input_nodes[1:]):
        return None
    return word.order(ndim, node.args, node.kwargs)


def writes_into(node: fx.Node, called: nn.Module | None = None) -> fx.Node | None:
    """The node whose data a node overwrites, if it does: ``x.add_(y)``, ``x += y``, ``relu(x, inplace=True)``.

    Args:
        node: The node.
        called: The child that it calls, which may be one that works in place.
    """
    if isinstance(node.kwargs.get('out'), fx.Node):
        return node.kwargs['out']  # type: ignore[return-value]
    if node.op == 'call_method':
        writes = writes_by_name(str(node.target))
    elif node.op == 'call_function':
        name, module = operation_name(node), getattr(node.target, '__module__', '')
        # operator.and_ and its like end with an underscore and write nothing.
        writes = name in _IN_PLACE_OPERATORS if module == '_operator' else writes_by_name(name)
        writes |= _given_inplace(node)
    else:
        writes = getattr(called, 'inplace', False) is True
    return node.all_input_nodes[0] if writes and node.all_input_nodes else None


def _given_inplace(node: fx.Node) -> bool:
    if 'inplace' in node.kwargs or True not in node.args:
        return node.kwargs.get('inplace') is True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # one of torch's that is compiled, which have no such argument
        return False
    return bound.arguments.get('inplace') is True


# Layers that return what they are given in eval mode, and norms: what is known of torch's modules.
PASSING_LAYERS = (nn.Identity, nn.Dropout)
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

# What acts on what is computed inside of it, or tells how: none of it leaves a node in a graph.
SWITCHES = {'autocast', 'no_grad', 'enable_grad', 'set_grad_enabled', 'inference_mode', 'checkpoint', 'checkpoint_seq'}
SWITCHES |= {'is_autocast_enabled', 'is_grad_enabled', 'is_inference_mode_enabled'}
# Whether gradients are computed is asked of a tensor, too, and is another thing in training than in a plan.
SWITCHES |= {'requires_grad', 'grad_fn', 'is_leaf'}

# Functions of torch that make something of numbers, sizes and types alone; in C, they take none that are traced.
MAKERS = {'ones', 'zeros', 'full', 'empty', 'eye', 'arange', 'linspace', 'tril_indices', 'triu_indices', 'tensor'}
MAKERS |= {'finfo', 'iinfo'}

DEVICE_QUESTIONS = ('device', 'is_cuda', 'is_cpu', 'is_meta', 'is_mps', 'is_xpu')

# How a forward goes through its children, or through the tensors in them.
WALKS = {'children', 'named_children', 'modules', 'named_modules', '_modules'}
WALKS_OF_TENSORS = {'parameters', 'named_parameters', 'buffers', 'named_buffers', 'state_dict'}


def names_of(*kinds: Kind) -> set[str]:
    """The bare names of all operations of some kinds."""
    return {name for name, word in WORDS.items() if word.kind in kinds}
