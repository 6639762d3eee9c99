"""One run of the weightless copy with all swaps applied, and what it shows: shapes that fit, parameters unread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import TraceError
from sem_timm.meta.layout_mode import LayoutMode
from sem_timm.meta.probing import Call
from sem_timm.surgery.aliasing import tensors_in
from sem_timm.surgery.placement import Placement, Rehearsal
from sem_timm.surgery.reading import Reader
from sem_timm.surgery.rewrite import patched_class
from sem_timm.surgery.sites import Swap
from sem_timm.surgery.swap.original import Original
from sem_timm.surgery.swap.unread import computed_in_vain, may_lose_others, reached_parameters, unread_parameters


def rehearse_swap(reader: Reader, placements: dict[str, Placement], operation: Swap) -> Rehearsal:
    """Applies placements to the weightless copy, which is used up by it, and runs it once.

    Raises:
        TraceError: If the model no longer runs, or returns other shapes.
    """
    skeleton, call = reader.probe.skeleton, reader.probe.calls['']
    images: Tensor = call.args[0]
    unread = unread_parameters(reader, placements)
    more = may_lose_others(reader, placements)
    before = reached_parameters(skeleton, images) if more else set()
    after = Rehearsal()
    for name, placement in placements.items():
        module, swapping = reader.modules[name], placement.swapped
        assert swapping is not None
        cores = swapping.cores.get(False, {})
        after.originals[name] = Original.of(module, placement.reading, cores)
        after.sliced.update({f'{name}.{weight}': rows for weight, rows in swapping.sliced.items()})
        vain = computed_in_vain(module, swapping.graphs.values()) | set(swapping.computed)
        after.computed.extend(f'{name}.{child}' for child in sorted(vain))
    # From here on the skeleton is patched, as the model will be.
    for name, placement in placements.items():
        module = reader.modules[name]
        for site in placement.attention_sites:
            module.add_module(site.attribute, operation.build(site, torch.device('meta'), site.dtype).eval())
        module.__class__ = patched_class(placement.edit)
    _check_run(skeleton, call, operation)
    if more:
        # Autograd on the meta device tells what no forward of a swapped module shows: parameters of others.
        lost = before - reached_parameters(skeleton, images)
        after.computed.extend(_still_called(skeleton, lost - set(unread)))
        unread = tuple(name for name, _ in skeleton.named_parameters() if name in lost or name in unread)
    after.unread.extend(unread)
    return after


def _still_called(skeleton: nn.Module, lost: set[str]) -> list[str]:
    """Names of the outermost modules of which no parameter reaches the output any more and which still are called.

    Such as the table of position biases that vit_srelpos computes once for all of its blocks.
    """
    found: list[str] = []
    # Outermost first, as named_modules goes.
    for name, module in skeleton.named_modules():
        parameters = {f'{name}.{parameter}' for parameter, _ in module.named_parameters()}
        if parameters and parameters <= lost and not name.startswith(tuple(f'{outer}.' for outer in found)):
            found.append(name)
    return found


def _check_run(skeleton: nn.Module, call: Call, operation: Swap) -> None:
    try:
        with torch.no_grad(), LayoutMode():
            output = skeleton(*call.args)
    except Exception as error:
        raise TraceError(f'the model does not run with {operation}: {type(error).__name__}: {error}') from error
    if _shapes(output) != _shapes(call.output):
        raise TraceError(f'the model returns {_shapes(output)} with {operation}, and {_shapes(call.output)} before')


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tensors_in(value)]
