"""Whose memory a tensor is, and what a call passes on of what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sem_timm
from sem_timm.meta import Call
from sem_timm.surgery.aliasing import linked, passed_on, share_memory
from tests.surgery.small_blocks import Net

VIEWS: dict[str, Callable[[Tensor], Any]] = {
    'itself': lambda x: x,
    'flattened': lambda x: x.flatten(1),
    'transposed': lambda x: x.mT,
    'halves': lambda x: x.chunk(2, 1),
    'every other': lambda x: (x[..., ::2], x[..., 1::2]),
    'the last rows twice': lambda x: [x[:, 2:], x[:, 2:].flatten(1)],
    'one of its own beside a view': lambda x: {'new': x + 1, 'view': x[:, 0]},
}


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_two_tensors_share_memory_where_they_have_numbers_in_common(device: str) -> None:
    x = torch.zeros(2, 4, 4, device=device)
    assert share_memory(x, x.mT) and share_memory(x[:, :2], x[:, 1:3]) and share_memory(x[0], x)
    assert not share_memory(x[:, :2], x[:, 2:]) and not share_memory(x[..., ::2], x[..., 1::2])
    assert not share_memory(x, x.clone()) and not share_memory(x[:0], x)


@pytest.mark.parametrize('name', VIEWS)
def test_what_was_passed_on_is_passed_on_of_other_numbers(name: str) -> None:
    """Recorded on meta, linked to real numbers: who writes into the one writes into the other, in the same places."""
    recorded, given = torch.empty(2, 4, 4, device='meta'), torch.arange(32.0).reshape(2, 4, 4)
    call = Call((recorded,), {}, VIEWS[name](recorded))
    unlinked = torch.utils._pytree.tree_map_only(Tensor, torch.zeros_like, VIEWS[name](given.clone()))
    result = linked(unlinked, passed_on(call), (given,), {})
    expected = VIEWS[name](given)
    for one, other in zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected)):
        assert share_memory(one, given) == share_memory(other, given)
        if share_memory(other, given):
            assert torch.equal(one, other) and (one is given) == (other is given)


class Split(nn.Module):
    """Returns two parts of what it is given, which may overlap."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.first], x[:, 8:]


class Gated(nn.Module):
    """A residual block that changes one of two parts in place."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.pre, self.split, self.out = nn.Conv2d(8, 16, 1), Split(first), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, scale = self.split(self.pre(x))
        scale += 1
        return x + self.out(value[:, :8] * scale + value[:, -8:])


def test_of_two_parts_one_may_be_changed_in_place_if_they_do_not_overlap() -> None:
    options: dict[str, Any] = {'target': 'block', 'position': 'residual', 'input_size': (3, 8, 8)}
    assert len(sem_timm.plan_model(Net(Gated(8)), **options)) == 1
    with pytest.raises(sem_timm.RefusedError, match='computes something else: out is given something else'):
        sem_timm.plan_model(Net(Gated(9)), **options)
