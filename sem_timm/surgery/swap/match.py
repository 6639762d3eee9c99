"""The scale of a new attention's output at the start: that of the old one, on random inputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sem_timm.surgery.evaluate import values_of
from sem_timm.surgery.plan import Plan
from sem_timm.surgery.skeleton import shadow


def match_scales(plan: Plan, modules: dict[str, nn.Module], built: Iterable[tuple[nn.Module, str, nn.Module]]) -> None:
    """Gives each new core the output scale of the old core it replaces, where there are weights to tell.

    The old attention runs once on normally distributed inputs of the probe's shapes. The modules, and the state of the
    random generators, are left alone.
    """
    new_of = {(id(module), attribute): new for module, attribute, new in built}
    for name, original in plan.originals.items():
        module, cores = modules[name], original.cores
        weights = next((p for p in module.parameters() if p.is_floating_point()), None)
        if weights is None or weights.is_meta:
            continue
        generator = torch.Generator().manual_seed(0)
        noise = partial(_noise, generator=generator, weights=weights)
        arguments = tree_map_only(Tensor, noise, original.values)
        nodes = [node for core in cores.values() for node in (core.query, core.output)]
        values = values_of(original.graph, shadow(module), arguments, nodes)
        for attribute, core in cores.items():
            reference = values[core.output]
            reference = reference.mT if core.transposed else reference
            plan.operation.match(new_of[id(module), attribute], values[core.query], reference)


def _noise(like: Tensor, generator: torch.Generator, weights: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=weights.device)
    return torch.randn(like.shape, generator=generator).to(weights)
