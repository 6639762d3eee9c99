"""What a forward leaves behind, in attributes and in what they hold, it leaves behind when it is patched, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sem_timm
from tests.surgery.traced_blocks import SIZE, Net, block


def counts_in_a_list(self: Any, x: Tensor) -> Tensor:
    self.log.append(1)
    return x + self.conv(x)


def counts_in_a_dictionary(self: Any, x: Tensor) -> Tensor:
    self.counts['calls'] = self.counts.get('calls', 0) + 1
    return x + self.conv(x) * self.counts['calls']


def notes_once(self: Any, x: Tensor) -> Tensor:
    self.seen.add('a call')
    return x + self.conv(x)


def starts_up(self: Any, x: Tensor) -> Tensor:
    if not self.ready:
        self.ready = True
        return x.clone()
    return x + self.conv(x)


def keeps_features(self: Any, x: Tensor) -> Tensor:
    self.counts['features'] = x.shape[0]
    return x + self.conv(x)


FORWARDS = [counts_in_a_list, counts_in_a_dictionary, notes_once, starts_up, keeps_features]


def network(forward: Callable[..., Any]) -> Any:
    model = Net(block(forward))
    model.block.log, model.block.counts, model.block.seen, model.block.ready = [], {}, set(), False
    return model


def state(model: Any) -> tuple[Any, ...]:
    return model.block.log, model.block.counts, model.block.seen, model.block.ready


@pytest.mark.parametrize('forward', FORWARDS)
def test_a_forward_that_changes_state_is_gated_as_a_whole(forward: Callable[..., Any]) -> None:
    base = network(forward)
    model = copy.deepcopy(base)
    with pytest.raises(sem_timm.RefusedError, match=r'forward changes .*self\.\w+, which a graph cannot show'):
        sem_timm.plan_model(model, target='block', position='residual', input_size=SIZE)
    sem_timm.patch_model(model, target='block', input_size=SIZE)
    assert state(model) == ([], {}, set(), False)
    for _ in range(3):
        x = torch.randn(2, *SIZE)
        assert torch.equal(base(x), model(x))
    assert state(base) == state(model) != ([], {}, set(), False)


def remembers_its_weights(self: Any, x: Tensor) -> Tensor:
    if 'mean' not in self.counts:
        self.counts['mean'] = self.mean * 2
    return x + self.conv(x) + self.counts['mean']


def test_a_memory_of_weights_is_filled_by_the_model_itself() -> None:
    base = network(remembers_its_weights)
    model = copy.deepcopy(base)
    sem_timm.patch_model(model, target='block', input_size=SIZE)
    assert model.block.counts == {}
    x = torch.randn(2, *SIZE)
    assert torch.equal(base(x), model(x))
