"""Which part of a model is trained, and when."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sem_timm.errors import OptionError
from sem_timm.finetuning.lora import adapter_parameters
from sem_timm.finetuning.models import head_parameters, inserted_parameters
from sem_timm.finetuning.options import ALL, LORA, NEW, FinetuneOptions


class Freezing:
    """Keeps a part of a model from being trained: for good, or stage by stage from the last to the first.

    The head is always trained. Where the base or a part of it is frozen for good, all of its batch norms are in
    evaluation mode, so that their statistics stay, also if their scales and shifts are trained; where stages are freed
    one by one, those of a frozen stage. Parameters that nothing reads never require gradients.

    Args:
        model: The model, before an optimizer is made for it.
        options: Those of the run.

    Raises:
        OptionError: If the model does not say what its head is, or nothing is left to train.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions) -> None:
        self.every = options.unfreeze_every
        self.stages: list[list[nn.Parameter]] = []
        self.num_free = 0
        parts = options.trained_parts if self.every is None else {NEW}
        is_partial = ALL not in parts
        trained = _trained_names(model, parts)
        frozen = [n for n, p in model.named_parameters() if is_partial and n not in trained and p.requires_grad]
        if is_partial:
            _check_something_is_trained(model, trained)
            self.stages = self._stages(model, frozen) if self.every is not None else []
        self._for_good = [model.get_parameter(name) for name in frozen] if self.every is None else []
        for parameter in self._for_good:
            parameter.requires_grad_(False)
        own = {id(p) for p in (*inserted_parameters(model).values(), *head_parameters(model).values())}
        self._keeps_statistics = is_partial and self.every is None
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m.weight) not in own]

    @staticmethod
    def _stages(model: nn.Module, names: list[str]) -> list[list[nn.Parameter]]:
        """Parameters by the coarse groups of timm's ``group_matcher``, those nearest to the head first."""
        if not hasattr(model, 'group_matcher'):
            raise OptionError(f'{type(model).__name__} has no group_matcher, which tells its stages; use --train new.')
        staged: Any = model
        layers = group_parameters(model, staged.group_matcher(coarse=True), reverse=True)
        order = sorted({layers[name] for name in names}, reverse=True)
        return [[model.get_parameter(name) for name in names if layers[name] == layer] for layer in order]

    def start(self) -> None:
        """Freezes all stages; to be called when the optimizer knows their parameters."""
        for parameter in (p for stage in self.stages for p in stage):
            parameter.requires_grad_(False)

    def advance(self, epoch: float) -> bool:
        """Frees the stages that are due at a time in epochs; returns whether there are new ones."""
        due = min(len(self.stages), int(epoch / self.every) if self.every else len(self.stages))
        fresh = self.stages[self.num_free : due]
        for parameter in (p for stage in fresh for p in stage):
            parameter.requires_grad_(True)
        self.num_free = max(due, self.num_free)
        return bool(fresh)

    def set_training_mode(self, model: nn.Module) -> None:
        """Puts a model into training mode, but for the norms of what is frozen."""
        model.train()
        frozen = {id(p) for stage in self.stages[self.num_free :] for p in stage}
        for norm in self._norms:
            if self._keeps_statistics or id(norm.weight) in frozen:
                norm.eval()


def _trained_names(model: nn.Module, parts: Collection[str]) -> set[str]:
    """The names of the parameters that are trained where not all are."""
    new, head = inserted_parameters(model), head_parameters(model)
    chosen = {*head, *(new if NEW in parts else ()), *(adapter_parameters(model) if LORA in parts else ())}
    for module_name, module in model.named_modules():
        # Some of timm's norms derive from none of torch's: all have the word in their name, or in that of a base.
        is_norm = any('Norm' in cls.__name__ for cls in type(module).__mro__)
        for name, parameter in module.named_parameters(module_name, recurse=False):
            is_vector = parameter.ndim == 1 and name not in new
            if is_vector and (('norms' in parts and is_norm) or ('biases' in parts and name.endswith('bias'))):
                chosen.add(name)
    return chosen


def _check_something_is_trained(model: nn.Module, trained: set[str]) -> None:
    if not callable(getattr(model, 'get_classifier', None)):
        raise OptionError(
            f'{type(model).__name__} does not say which module is its head, which would be frozen with the '
            'base. Give it a method get_classifier() that returns the head, as models of timm have.'
        )
    if not any(p.requires_grad for n, p in model.named_parameters() if n in trained):
        raise OptionError('with the base frozen nothing is left to train; put in new modules, or a new head.')
