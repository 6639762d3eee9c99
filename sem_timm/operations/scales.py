"""The scale of a new attention's output at the start: that of the old one, on what it gets inside the model."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.errors import SwapWarning
from sem_timm.meta import Call, dtype_of, shadow
from sem_timm.operations.attention import AttentionConfig
from sem_timm.surgery import Built, Edit, Original, Plan, bound_arguments, patched_class, tensors_in

# Biases and nonlinear layers behind a core make its scale and that of the module's output differ, so the latter is
# corrected step by step, until the standard deviations agree to this part.
CORRECTIONS, TOLERANCE = 8, 0.1


def match_scales(model: nn.Module, plan: Plan, built: list[Built]) -> None:
    """Gives each new core the output scale of the old core it replaces, where there are weights to tell.

    The model, not patched yet, runs once on two random images. Tokens inside a network have much in common, which an
    attention keeps when it averages over them; independent random tokens would tell another scale. The run is one of a
    copy around the same weights, so that it leaves the model alone, and the state of the random generators too.

    Args:
        model: The model.
        plan: The plan that is about to be applied to it.
        built: The new children.
    """
    operation, weights = plan.operation, next(iter(model.parameters()), None)
    if not isinstance(operation, AttentionConfig) or not operation.scales_output or weights is None:
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    modes = [(part.new, part.new.training) for part in built]
    twin = shadow(model)
    for name, original in plan.originals.items():
        new = {part.site.attribute: part.new for part in built if part.site.name == name}
        hook = _Matching(original, plan.edits[name], new, operation)
        twin.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *plan.input_size, generator=generator, device='cpu').to(weights.device, dtype_of(model))
    try:
        for child, _ in modes:
            child.eval()
        with torch.no_grad(), weights.device:
            twin(images)
    except RuntimeError as error:  # such as a kernel that is missing for the type on this device
        message = f'{plan.model_name} does not run on random images of {plan.input_size}, so that its new attention '
        message += f'could not be given the scale of the old one. {error}'
        warnings.warn(message, SwapWarning, stacklevel=4)
    finally:
        for child, training in modes:
            child.train(training)


class _Matching:
    """A hook before an old attention module that scales the new cores, by the arguments of its first call."""

    def __init__(self, original: Original, edit: Edit, new: dict[str, nn.Module], operation: AttentionConfig) -> None:
        self.original, self.edit, self.new, self.operation = original, edit, new, operation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new, self.new = self.new, {}
        if not new:  # called before
            return
        if self.original.graph is not None:
            arguments = bound_arguments(module, Call(args, kwargs, None))
            for attribute, old in self.original.compute(module, arguments).items():
                inputs = (old.query, old.key, old.value) if self.operation.reads_keys else (old.query,)
                self._scale([new[attribute]], new[attribute](*inputs), old.output)
        before = tensors_in(module.forward(*args, **kwargs))[0]
        module.__class__ = patched_class(self.edit)
        for attribute, child in new.items():
            module.add_module(attribute, child)
        for _ in range(CORRECTIONS):
            factor = self._scale(list(new.values()), tensors_in(module.forward(*args, **kwargs))[0], before)
            if abs(factor - 1) < TOLERANCE:
                break
        module.__class__ = self.edit.base

    def _scale(self, new: list[nn.Module], present: Tensor, wanted: Tensor) -> float:
        """Scales new cores by how much larger one standard deviation is than another, where that has a meaning."""
        has, wants = (float(x.cpu().double().std(correction=0)) for x in (present, wanted))
        factor = wants / has if has > 0 else 0.0
        if not math.isfinite(factor) or factor == 0:  # such as a module that returns zero before training
            return 1.0
        for child in new:
            self.operation.scale_output(child, factor)
        return factor
