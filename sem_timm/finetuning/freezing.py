"""Which part of a model is trained, and when."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sem_timm.errors import OptionError
from sem_timm.finetuning.models import head_parameters, inserted_parameters
from sem_timm.finetuning.options import FinetuneOptions


class Freezing:
    """Keeps the base of a model from being trained: for good, or stage by stage from the last to the first.

    New modules and the head are always trained. Batch norms of a frozen part are in evaluation mode, so that their
    statistics stay. Parameters that nothing reads never require gradients.

    Args:
        model: The model, before an optimizer is made for it.
        options: Those of the run.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions) -> None:
        self.every = options.unfreeze_every
        self.stages: list[list[nn.Parameter]] = []
        self.num_free = 0
        kept = {*inserted_parameters(model), *head_parameters(model)}
        frozen = [n for n, p in model.named_parameters() if n not in kept and p.requires_grad]
        if options.freeze_base or self.every is not None:
            if not callable(getattr(model, 'get_classifier', None)):
                raise OptionError(
                    f'{type(model).__name__} does not say which module is its head, which would be frozen with the '
                    'base. Give it a method get_classifier() that returns the head, as models of timm have.'
                )
            if not any(p.requires_grad for n, p in model.named_parameters() if n in kept):
                raise OptionError('with the base frozen nothing is left to train; put in new modules, or a new head.')
            self.stages = self._stages(model, frozen) if self.every is not None else []
        self._for_good = [model.get_parameter(name) for name in frozen] if options.freeze_base else []
        for parameter in self._for_good:
            parameter.requires_grad_(False)
        new = {id(p) for p in inserted_parameters(model).values()}
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m.weight) not in new]

    @staticmethod
    def _stages(model: nn.Module, names: list[str]) -> list[list[nn.Parameter]]:
        """Parameters by the coarse groups of timm's ``group_matcher``, those nearest to the head first."""
        if not hasattr(model, 'group_matcher'):
            raise OptionError(
                f'{type(model).__name__} has no group_matcher, which tells its stages; use --freeze-base.'
            )
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
        frozen = {id(p) for p in self._for_good} | {id(p) for stage in self.stages[self.num_free :] for p in stage}
        for norm in self._norms:
            if id(norm.weight) in frozen or (norm.weight is None and self._for_good):
                norm.eval()
