"""The vocabulary: what it says is what torch does, and a new operation is one entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sem_timm
from sem_timm.meta import vocabulary
from sem_timm.meta.vocabulary import EITHER, NEW, SHARED, WORDS, Kind, Word, kind_of, order_of, word_of, writes_into
from sem_timm.surgery.aliasing import share_memory, tensors_in
from tests.swap.small_attention import Model, Projected

X = torch.arange(24.0).reshape(2, 3, 4)
MASK = torch.ones(2, 3, 4, dtype=torch.bool)
MAPS = torch.rand(2, 3, 4, 4)

# For operations that may return memory of their first operand, or not, a call that does and one that does not.
EITHER_WAY: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    'to': (lambda: X.to(torch.float32), lambda: X.to(torch.float64)),
    'type': (lambda: X.type(torch.float32), lambda: X.type(torch.float64)),
    'float': (lambda: X.float(), lambda: X.double().float()),
    'half': (lambda: X, lambda: X.half()),
    'double': (lambda: X, lambda: X.double()),
    'bfloat16': (lambda: X, lambda: X.bfloat16()),
    'cpu': (lambda: X.cpu(), lambda: torch.ones(1)),
    'type_as': (lambda: X.type_as(X), lambda: X.type_as(X.double())),
    'contiguous': (lambda: X.contiguous(), lambda: X.mT.contiguous()),
    'reshape': (lambda: X.reshape(6, 4), lambda: X.mT.reshape(6, 4)),
    'flatten': (lambda: X.flatten(), lambda: X.mT.flatten()),
    'ravel': (lambda: X.ravel(), lambda: X.mT.ravel()),
    'reshape_as': (lambda: X.reshape_as(X.flatten()), lambda: X.mT.reshape_as(X.flatten())),
    'dropout': (lambda: F.dropout(X, 0.5, False), lambda: F.dropout(X, 0.5, True)),
}

SHARING: dict[str, Callable[[], Any]] = {
    'detach': lambda: X.detach(),
    'data': lambda: X.data,
    'expand': lambda: X[:, :1].expand(2, 3, 4),
    'broadcast_to': lambda: X[:, :1].broadcast_to(2, 3, 4),
    'expand_as': lambda: X[:, :1].expand_as(X),
    'view': lambda: X.view(6, 4),
    'unflatten': lambda: X.unflatten(2, (2, 2)),
    'squeeze': lambda: X.squeeze(),
    'unsqueeze': lambda: X.unsqueeze(0),
    'view_as': lambda: X.view_as(X.flatten()),
    'permute': lambda: X.permute(0, 2, 1),
    'transpose': lambda: X.transpose(0, 1),
    'swapaxes': lambda: torch.swapaxes(X, 1, 2),
    'swapdims': lambda: X.swapdims(1, 2),
    'movedim': lambda: X.movedim(0, 2),
    'moveaxis': lambda: torch.moveaxis(X, (0, 1), (1, 0)),
    'mT': lambda: X.mT,
    'mH': lambda: X.mH,
    'T': lambda: X[0].T,
    'H': lambda: X[0].H,
    't': lambda: X[0].t(),
    'chunk': lambda: X.chunk(2, 2),
    'split': lambda: X.split(2, 2),
    'split_with_sizes': lambda: X.split_with_sizes([1, 3], 2),
    'tensor_split': lambda: X.tensor_split(2, 2),
    'unbind': lambda: X.unbind(1),
    'getitem': lambda: X[:, 1:],
    'select': lambda: X.select(1, 0),
    'narrow': lambda: X.narrow(1, 0, 2),
    'diagonal': lambda: X.diagonal(),
}

# Of operations with results of their own those that are tried in no other test.
OWN: dict[str, Callable[[], Any]] = {
    'clone': lambda: X.clone(),
    'masked_fill': lambda: X.masked_fill(~MASK, 1.0),
    'where': lambda: torch.where(MASK, X, 0.0),
    'bmm': lambda: torch.bmm(X, X.mT),
    'einsum': lambda: torch.einsum('bij->bij', X) + 0,
    'baddbmm': lambda: torch.baddbmm(X[:, :, :3], X, X.mT),
    'zeros_like': lambda: torch.zeros_like(X),
    'full_like': lambda: torch.full_like(X, 2.0),
    'new_ones': lambda: X.new_ones(2, 3),
    'new_full': lambda: X.new_full((2, 3), 1.0),
    'conv3d': lambda: F.conv3d(X[None], torch.ones(2, 1, 1, 1, 1)),
    'embedding': lambda: F.embedding(MASK.long(), X[0]),
    'bilinear': lambda: F.bilinear(X[0], X[0], torch.ones(2, 4, 4)),
    'instance_norm': lambda: F.instance_norm(MAPS),
}


def shares(result: Any) -> bool:
    return any(share_memory(X, tensor) for tensor in tensors_in(result))


@pytest.mark.parametrize('name', [*SHARING, *OWN, *EITHER_WAY])
def test_memory_is_shared_as_the_word_says(name: str) -> None:
    if name in EITHER_WAY:
        shared, new = EITHER_WAY[name]
        assert WORDS[name].memory == EITHER and shares(shared()) and not shares(new())
    else:
        assert WORDS[name].memory == (SHARED if name in SHARING else NEW)
        assert shares({**SHARING, **OWN}[name]()) == (name in SHARING)


def test_every_word_with_memory_of_others_is_tried() -> None:
    tried = {*SHARING, *EITHER_WAY, 'cuda'}
    assert {name for name, word in WORDS.items() if word.memory != NEW} == tried


ORDERS: dict[str, Callable[[Any], Any]] = {
    'permute': lambda x: x.permute(2, 0, 1),
    'permute with a tuple': lambda x: torch.permute(x, (1, -1, 0)),
    'transpose': lambda x: x.transpose(-1, 0),
    'transpose by name': lambda x: torch.transpose(x, dim0=1, dim1=2),
    'swapaxes': lambda x: x.swapaxes(0, 1),
    'movedim': lambda x: x.movedim(0, -1),
    'moveaxis of two': lambda x: torch.moveaxis(x, (0, 2), (1, 0)),
    'mT': lambda x: x.mT,
}


@pytest.mark.parametrize('name', ORDERS)
def test_the_order_of_axes_is_that_of_torch(name: str) -> None:
    graph = fx.symbolic_trace(ORDERS[name]).graph
    (node,) = [node for node in graph.nodes if node.op in ('call_method', 'call_function')]
    order = order_of(node, 3)
    assert kind_of(node) is Kind.PERMUTATION and order is not None
    assert ORDERS[name](X).shape == X.permute(order).shape and torch.equal(ORDERS[name](X), X.permute(order))


SPELLINGS: list[tuple[Callable[..., Any], Kind, bool]] = [
    (lambda x, y: x + y, Kind.SUM, False),
    (lambda x, y: torch.add(x, y), Kind.SUM, False),
    (lambda x, y: x.add(y), Kind.SUM, False),
    (lambda x, y: x.add_(y), Kind.SUM, True),
    (lambda x, y: 2 * x, Kind.PRODUCT, False),
    (lambda x, y: x.multiply_(y), Kind.PRODUCT, True),
    (lambda x, y: x / y, Kind.QUOTIENT, False),
    (lambda x, y: torch.relu_(x), Kind.MAP, True),
    (lambda x, y: F.relu(x, True), Kind.MAP, True),
    (lambda x, y: F.silu(x, inplace=True), Kind.MAP, True),
    (lambda x, y: F.dropout(x, 0.1, True), Kind.DROPOUT, False),
    (lambda x, y: torch.mul(x, y, out=x), Kind.PRODUCT, True),
    (lambda x, y: x.shape, Kind.LOOKUP, False),
    (lambda x, y: x.mT, Kind.PERMUTATION, False),
    (lambda x, y: x.type_as(y), Kind.CAST, False),
    (lambda x, y: torch.ones_like(x), Kind.FILL, False),
    (lambda x, y: x.new_zeros(3), Kind.FILL, False),
    (lambda x, y: x.softmax(-1), Kind.SOFTMAX, False),
    (lambda x, y: F.softmax(x, dim=-1), Kind.SOFTMAX, False),
]


@pytest.mark.parametrize(('call', 'kind', 'writes'), SPELLINGS)
def test_spellings_of_one_operation_are_one_word(call: Callable[..., Any], kind: Kind, writes: bool) -> None:
    *_, node, _ = fx.symbolic_trace(call).graph.nodes
    assert kind_of(node) is kind and (writes_into(node) is not None) == writes


def test_an_operator_whose_name_only_looks_as_if_it_wrote_writes_nothing() -> None:
    *_, node, _ = fx.symbolic_trace(lambda x, y: x & y).graph.nodes
    assert writes_into(node) is None


def add(x: Tensor, y: Tensor) -> Tensor:
    """Somebody's own function with a name of torch's."""
    return x * y


def test_a_foreign_function_is_no_word_whatever_its_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder('x')
    assert word_of(graph.call_function(add, (x, x))) is None


class WithoutNan(Projected):
    """Does something to logits that no model of timm does."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).nan_to_num().softmax(-1) @ v


def test_an_operation_that_is_unknown_today_takes_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(WithoutNan())
    with pytest.raises(sem_timm.RefusedError, match='its softmax is not over products of queries and keys'):
        sem_timm.plan_model(model, 'efficient', input_size=(3, 32, 32))
    (entry,) = vocabulary._words(Kind.BOUND, 'nan_to_num')
    monkeypatch.setitem(WORDS, *entry)
    assert len(sem_timm.plan_model(model, 'efficient', input_size=(3, 32, 32))) == 1


class Viewed(nn.Module):
    """Returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


class AddsBehindANorm(nn.Module):
    """Adds to what a norm returned in place, and reads what the norm was given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out = self.norm(y)
        out += x
        return out * y.sigmoid()


@pytest.mark.parametrize(
    ('layer', 'is_site'),
    [
        (nn.BatchNorm2d(8), True),
        (nn.GroupNorm(2, 8), True),
        (nn.SiLU(), True),
        (nn.Softmax(1), True),
        (nn.SiLU(inplace=True), False),
        (nn.Identity(), False),
        (nn.Dropout(0.1), False),
        (Viewed(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_child_returns_anew_may_be_added_to_in_place(layer: nn.Module, is_site: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), AddsBehindANorm(layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    options: dict[str, Any] = {'target': 'block', 'position': 'residual', 'input_size': (3, 16, 16)}
    if is_site:
        assert len(sem_timm.plan_model(Net(), **options)) == 1
    else:
        with pytest.raises(sem_timm.RefusedError):
            sem_timm.plan_model(Net(), **options)


def test_words_are_plain_data() -> None:
    assert all(isinstance(word, Word) and name == name.strip('_') for name, word in WORDS.items())
