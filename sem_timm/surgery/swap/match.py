"""The scale of a new attention's output at the start: that of the old one, on random inputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sem_timm.surgery.evaluate import values_of
from sem_timm.surgery.plan import Plan
from sem_timm.surgery.skeleton import shadow
from sem_timm.surgery.swap.rehearsal import Original


def match_scales(plan: Plan, modules: dict[str, nn.Module], built: Iterable[tuple[nn.Module, str, nn.Module]]) -> None:
    """Gives each new core the output scale of the old core it replaces, where there are weights to tell.

    The old attention runs once on normally distributed inputs of the probe's shapes. The modules, and the state of the
    random generators, are left alone.
    """
    new_of = {(id(module), attribute): new for module, attribute, new in built}
    originals: dict[str, Original] = plan.originals
    for name, original in originals.items():
        module = modules[name]
        weights = next((p for p in module.parameters() if p.is_floating_point()), None)
        if weights is None or weights.is_meta:
            continue
        generator = torch.Generator().manual_seed(0)
        noise = partial(_noise, generator=generator, weights=weights)
        arguments = tree_map_only(Tensor, noise, original.values)
        for attribute, (inputs, reference) in _old_outputs(original, shadow(module), arguments).items():
            plan.operation.match(new_of[id(module), attribute or plan.operation.attribute], inputs, reference)


def _old_outputs(original: Original, module: nn.Module, arguments: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each old core and what comes out of it, by the new child; of the whole module under ''."""
    if original.graph is None:
        with torch.no_grad():
            return {'': (next(iter(arguments.values())), module(**arguments))}
    nodes = [node for core in original.cores.values() for node in (core.query, core.output)]
    values = values_of(original.graph, module, arguments, nodes)
    return {
        attribute: (values[core.query], values[core.output].mT if core.transposed else values[core.output])
        for attribute, core in original.cores.items()
    }


def _noise(like: Tensor, generator: torch.Generator, weights: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=weights.device)
    return torch.randn(like.shape, generator=generator).to(weights)
