"""Every layer of the package with an input, found from the package, so that a new one is asked too."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

import sem_timm.layers
from sem_timm.layers import (
    SEM,
    AttentionCore,
    ChannelGate,
    Excitation,
    ExternalAttention2d,
    MultiHeadExternalAttention,
    ScaleAndShift,
    WithValues,
    attention_core_class,
    attention_core_names,
    excitation_names,
    timm_attention,
)
from sem_timm.layers.sem import DECISION_FORMS

BASES = (AttentionCore, ChannelGate)


@dataclass(frozen=True)
class Case:
    """A way to build a layer, and the shapes of its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def layer(self) -> nn.Module:
        """The layer with all parameters away from zero."""
        layer = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        return layer

    def inputs(self, batch_size: int = 2) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        return tuple(torch.randn(batch_size, *shape, generator=generator) for shape in self.shapes)


def _core(name: str) -> Case:
    cls = attention_core_class(name)
    return Case(lambda: cls(8, num_heads=2), ((2, 16, 8),) * (3 if cls.reads_keys else 1))


def _with_values(name: str) -> nn.Module:
    return WithValues(attention_core_class(name)(8, num_heads=2), True, True)


def _multi_head(**options: Any) -> Callable[[], nn.Module]:
    return lambda: MultiHeadExternalAttention(16, 2, memory=5, **options)


# More tokens than the layer is wide, so that products of weights pay.
_TOKENS = ((100, 16),)
_MAPS = ((16, 6, 6),)

CASES: dict[str, Case] = {
    **{f'sem_{decision}': Case(lambda d=decision: SEM(16, decision=d), _MAPS) for decision in DECISION_FORMS},  # type: ignore[misc]
    'sem_of_all': Case(lambda: SEM(16, operators=excitation_names()), _MAPS),
    'sem_with_a_shortcut': Case(lambda: SEM(16), _MAPS * 2),
    'sem_of_tokens': Case(lambda: SEM(16, channel_dim=-1, num_prefix_tokens=1), _TOKENS),
    **{name: Case(lambda n=name: Excitation(16, n), _MAPS) for name in excitation_names()},  # type: ignore[misc]
    **{name: _core(name) for name in attention_core_names()},
    'external_with_values': Case(lambda: _with_values('external'), ((2, 16, 8),) * 3),
    'linear_with_values': Case(lambda: _with_values('linear'), ((2, 16, 8),) * 3),
    'eamlp': Case(_multi_head(), _TOKENS),
    'eamlp_normed': Case(_multi_head(qk_norm=True, scale_norm=True, norm_layer=LayerNorm), _TOKENS),
    'ssf': Case(lambda: ScaleAndShift(16), _MAPS),
    'external2d': Case(lambda: ExternalAttention2d(16, memory=5), _MAPS),
    'timm_eca_of_tokens': Case(lambda: timm_attention('eca', 16, channel_dim=-1, num_prefix_tokens=1), _TOKENS),
    'timm_ese_of_maps': Case(lambda: timm_attention('ese', 16, channel_dim=-1), ((6, 6, 16),)),
}


def layer_classes() -> set[type[nn.Module]]:
    """The classes of modules in the files of the package."""
    found: set[type[nn.Module]] = set()
    for file in pkgutil.iter_modules(sem_timm.layers.__path__):
        module = importlib.import_module(f'sem_timm.layers.{file.name}')
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                found.add(cls)
    return found


def called_children(layer: nn.Module) -> dict[str, nn.Module]:
    """The children that hold parameters, at any depth."""
    return {name: child for name, child in layer.named_modules() if name and child._parameters}


def holders(layer: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight, as pruning, norms of weights and adapters look for them."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {name: child for name, child in layer.named_modules() if isinstance(child, kinds)}


WITH_CHILDREN = [name for name, case in CASES.items() if called_children(case.build())]
WITH_WEIGHTS = [name for name, case in CASES.items() if holders(case.build())]
