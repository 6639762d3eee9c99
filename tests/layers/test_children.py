"""New layers are ordinary modules: children are called, so that what others put around a layer has its effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import is_pruned

from tests.layers.every_layer import BASES, CASES, WITH_CHILDREN, WITH_WEIGHTS, called_children, holders, layer_classes
from tests.versions import set_submodule


def test_every_layer_of_the_package_is_asked() -> None:
    asked = {type(module) for case in CASES.values() for module in case.build().modules()}
    assert layer_classes() - asked == set(BASES)


def results(name: str, layer: nn.Module) -> list[Tensor]:
    """What a layer returns with gradients and without, which may be computed in different ways."""
    inputs = CASES[name].inputs()
    out: Tensor = layer(*inputs)
    with torch.no_grad():
        return [out.detach(), layer(*inputs)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all((one - other).abs().max() > 1e-3 for one, other in zip(found, expected))


@pytest.mark.parametrize('name', WITH_CHILDREN)
def test_hooks_fire_on_every_child_that_holds_parameters(name: str) -> None:
    layer = CASES[name].layer()
    expected = results(name, layer)
    fired: dict[str, list[str]] = {'forward': [], 'backward': []}
    for child_name, child in called_children(layer).items():
        child.register_forward_hook(lambda *_, n=child_name: fired['forward'].append(n))  # type: ignore[misc]
        child.register_full_backward_hook(lambda *_, n=child_name: fired['backward'].append(n))  # type: ignore[misc]
    close(results(name, layer), expected)
    assert sorted(fired['forward']) == sorted(2 * list(called_children(layer)))
    layer(*(x.requires_grad_() for x in CASES[name].inputs())).square().sum().backward()
    assert sorted(fired['backward']) == sorted(called_children(layer))


@pytest.mark.parametrize('name', WITH_CHILDREN)
def test_what_a_hook_keeps_is_not_written_over(name: str) -> None:
    layer = CASES[name].layer()
    kept: list[tuple[Tensor, Tensor]] = []
    for child in called_children(layer).values():
        child.register_forward_hook(lambda *args: kept.append((args[-1], args[-1].clone())))
    results(name, layer)
    assert kept and all(torch.equal(now, then) for now, then in kept)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, 'weight', amount=0.5)


# What changes the numbers of a layer, and what leaves them at first.
CHANGES: dict[str, Callable[[Any], object]] = {
    'prune': pruned,
    'spectral_norm': spectral_norm,
    'spectral_norm_by_parametrization': parametrizations.spectral_norm,
}
KEEPS: dict[str, Callable[[Any], object]] = {
    'weight_norm': weight_norm,
    'weight_norm_by_parametrization': parametrizations.weight_norm,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*deprecated:FutureWarning')
@pytest.mark.parametrize('change', [*CHANGES, *KEEPS])
@pytest.mark.parametrize('name', WITH_WEIGHTS)
def test_weights_that_are_computed_have_their_effect_and_train(name: str, change: str) -> None:
    layer = CASES[name].layer()
    expected = results(name, layer)
    for child in holders(layer).values():
        {**CHANGES, **KEEPS}[change](child)
    assert any(child._forward_pre_hooks or is_parametrized(child) for child in layer.modules())
    if change in CHANGES:
        assert differ(results(name, layer), expected)
        assert change != 'prune' or is_pruned(layer)
    else:
        close(results(name, layer), expected)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    before = results(name, layer)
    for _ in range(3):
        optimizer.zero_grad()
        layer(*CASES[name].inputs()).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not torch.equal(results(name, layer)[1], before[1])


class LowRank(nn.Module):
    """An adapter in the place of a layer, which shows the layer's weight as its own, as those of PEFT do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.weight[0].numel()) * 0.5)
        self.up = nn.Parameter(torch.randn(len(base.weight), 2) * 0.5)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('base'), name)

    def change(self) -> Tensor:
        return (self.up @ self.down).view_as(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        weights = {'weight': self.base.weight + self.change()}
        out: Tensor = torch.func.functional_call(self.base, weights, (x,))
        return out

    def merged(self) -> nn.Module:
        with torch.no_grad():
            self.base.weight.add_(self.change())
        base: nn.Module = self.base
        return base


@pytest.mark.parametrize('name', WITH_WEIGHTS)
def test_adapters_in_the_place_of_layers_have_their_effect_and_merge(name: str) -> None:
    layer = CASES[name].layer()
    for child_name in holders(layer):
        expected = results(name, layer)
        adapter = LowRank(layer.get_submodule(child_name))
        set_submodule(layer, child_name, adapter)
        adapted = results(name, layer)
        assert differ(adapted, expected), child_name
        layer(*CASES[name].inputs()).sum().backward()
        assert adapter.up.grad is not None
        set_submodule(layer, child_name, adapter.merged())
        close(results(name, layer), adapted)


@pytest.mark.parametrize('name', WITH_CHILDREN)
def test_offloaded_weights_come_back_when_they_are_needed(name: str) -> None:
    layer = CASES[name].layer().eval()
    inputs = CASES[name].inputs()
    with torch.no_grad():
        expected = layer(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            accelerate.cpu_offload(layer, execution_device=torch.device('cpu'), offload_buffers=True)
        assert all(parameter.is_meta for parameter in layer.parameters())
        torch.testing.assert_close(layer(*inputs), expected, rtol=1e-5, atol=1e-5)
