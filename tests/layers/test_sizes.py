"""Sizes are read from tensors: a gate whose channels were pruned acts on those that remain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sem_timm.errors import ModelError
from sem_timm.layers import SEM, ChannelGate, Excitation, excitation_names
from tests.layers.every_layer import CASES

CHANNELS = 40  # lct has 10 groups of them, and 5 of the 20 that are kept
KEPT = torch.arange(0, CHANNELS, 2)


def prune_channels(gate: nn.Module) -> None:
    """Cuts parameters as pruners do: every axis that counts channels, in place, with no word to the gate."""
    for module in gate.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                axes = [axis for axis, size in enumerate(parameter.shape) if size == CHANNELS]
                kept = parameter.detach()
                for axis in axes:
                    kept = kept.index_select(axis, KEPT)
                module._parameters[name] = nn.Parameter(kept)


@pytest.mark.parametrize('channel_dim', [1, -1])
@pytest.mark.parametrize('build', [*excitation_names(), SEM])
def test_a_pruned_gate_is_the_gate_of_what_remains(build: Any, channel_dim: int) -> None:
    options: dict[str, Any] = dict(channel_dim=channel_dim)
    gate: ChannelGate = SEM(CHANNELS, **options) if build is SEM else Excitation(CHANNELS, build, **options)
    small: ChannelGate = SEM(len(KEPT), **options) if build is SEM else Excitation(len(KEPT), build, **options)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    prune_channels(gate)
    x: Tensor = torch.randn(2, CHANNELS, 5, 5).movedim(1, channel_dim)
    x = x.index_select(channel_dim, KEPT)
    small.load_state_dict(gate.state_dict())
    assert gate(x).shape == x.shape and not torch.equal(gate(x), x)
    torch.testing.assert_close(gate(x), small(x))
    torch.testing.assert_close(gate(x, x), small(x, x))


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*')
@pytest.mark.parametrize('name', ['sem_sigmoid', 'eca', 'external', 'linear', 'eamlp', 'external2d'])
def test_script_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ModelError, match=r'torch\.jit\.trace\(model'):
        torch.jit.script(nn.Sequential(CASES[name].build()))
