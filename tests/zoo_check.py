"""One architecture of timm, patched and given back, with everything about it compared with the model before.

Models of up to `MAX_PARAMETERS` are checked in numbers, on the CPU and at the smallest images they take; larger ones on
the meta device, where shapes, keys, classes and which parameters are reached can still be told.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

import sem_timm
from tests.outputs import outputs
from tests.snapshot import assert_same, snapshot
from tests.twins import trained
from tests.zoo_subject import Step, Subject

GRADIENT_TOLERANCE = 1e-10  # of the norm, in double precision


@dataclass
class Result:
    """What one operation did to one architecture.

    Attributes:
        image_size: Height and width of the images.
        sites: Number of modules inserted, or of attentions swapped.
        residual: How many of the sites are on residual branches.
        refused: Name and reason of each module that was refused.
        message: Why the model as a whole was refused.
        new_parameters: How many numbers the new parameters hold.
        gradient_error: How far the gradients of all old parameters are from what they were, over their norm.
        held: The statements that held.
        failed: Those that did not, each with what was seen instead.
    """

    image_size: int = 0
    sites: int = 0
    residual: int = 0
    refused: list[str] = field(default_factory=list)
    message: str = ''
    new_parameters: int = 0
    gradient_error: float = 0.0
    held: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def check(subject: Subject, operation: str) -> Result:
    """Patches a copy of the model, compares it with the model in every way, and undoes the patch.

    A forward that pads some images and not others is planned for one of both. Such a model is checked with the
    images of its configuration, which it was planned for.
    """
    try:
        return _check(subject, operation)
    except sem_timm.GuardError:
        return _check(Subject(subject.architecture, smallest=False), operation)


def _check(subject: Subject, operation: str) -> Result:
    _ = subject.outputs  # some models keep what they computed for inference
    result, model = Result(subject.images.shape[-1]), copy.deepcopy(subject.model)
    before = snapshot(model)
    undone = {'undo': lambda: assert_same(before, snapshot(model), random_state=False)}
    try:
        plan = sem_timm.plan_model(model, operation, input_size=subject.probe)
    except sem_timm.RefusedError as refusal:
        result.message = str(refusal)
        _record(result, undone)
        return result
    result.sites, result.residual = len(plan), sum(site.position == 'residual' for site in plan)
    result.refused = [f'{refusal.name}: {refusal.reason}' for refusal in plan.refusals]
    result.new_parameters = plan.num_parameters
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sem_timm.SwapWarning)
        sem_timm.patch_model(model, plan)
    comparison = Comparison(subject, model, plan)
    _ = comparison.outputs
    _record(result, comparison.statements())
    if 'old gradients' in result.held:
        result.gradient_error = comparison.gradient_error
    sem_timm.unpatch_model(model)
    _record(result, undone)
    return result


class Comparison:
    """A patched model beside the subject it was copied from.

    Args:
        subject: The unpatched model.
        model: The patched one.
        plan: What was applied to it.
    """

    def __init__(self, subject: Subject, model: nn.Module, plan: sem_timm.Plan) -> None:
        self.subject, self.model, self.plan = subject, model, plan

    def statements(self) -> dict[str, Callable[[], None]]:
        """What has to hold, by name; each raises an error if it does not."""
        common = {'shape': self.shape, 'keys': self.keys, 'copy': self.copy, 'gradients': self.gradients}
        if self.plan.swaps_attention:
            return common
        return {**common, 'identity': self.identity, 'training': self.training, 'old gradients': self.old_gradients}

    @cached_property
    def outputs(self) -> list[Tensor]:
        """Of the patched model in inference."""
        return outputs(self.model, self.subject.images)

    @cached_property
    def twin(self) -> nn.Module:
        """A copy of the patched model, to be trained."""
        return copy.deepcopy(self.model)

    @cached_property
    def step(self) -> Step:
        """A training step of the patched model."""
        return Step.of(self.twin, self.subject.images)

    def shape(self) -> None:
        """The outputs have the shapes they had, and are finite where they were."""
        for old, new in _pairs(self.subject.outputs, self.outputs):
            assert old.shape == new.shape and old.dtype == new.dtype, f'{tuple(old.shape)} became {tuple(new.shape)}'
            assert old.is_meta or new.isfinite().all() or not old.isfinite().all(), 'not finite'

    def keys(self) -> None:
        """All keys of the state_dict are still there, in their order and with their values; new ones came in."""
        old, new = self.subject.model.state_dict(), self.model.state_dict()
        assert [name for name in new if name in old] == list(old), f'missing: {sorted(old.keys() - new.keys())[:3]}'
        assert len(new) > len(old), 'there are no new ones'
        for name, tensor in old.items():
            assert _same(tensor, new[name]), f'{name} changed'

    def copy(self) -> None:
        """A deep copy computes the same, with new modules that are no identity any more."""
        model = trained(copy.deepcopy(self.model))
        for first, second in _pairs(*(outputs(each, self.subject.images) for each in (model, copy.deepcopy(model)))):
            assert _same(first, second), f'off by {_difference(first, second)}'

    def gradients(self) -> None:
        """Each new parameter gets a gradient, and each old one that had one and is still read."""
        new = self.step.gradients
        lost = self.subject.step.gradients.keys() - new.keys() - set(self.plan.unread)
        assert not lost, f'{len(lost)} old parameters have none: {sorted(lost)[:3]}'
        names = {name for name, _ in self.twin.named_parameters()}
        without = names - {name for name, _ in self.subject.model.named_parameters()} - new.keys()
        assert not without, f'{len(without)} new parameters have none: {sorted(without)[:3]}'
        for name, gradient in new.items():
            assert gradient.is_meta or gradient.isfinite().all(), f'that of {name} is not finite'

    def identity(self) -> None:
        """In inference the outputs are the same, bit for bit."""
        for old, new in _pairs(self.subject.outputs, self.outputs):
            assert _same(old, new), f'off by {_difference(old, new)}'

    def training(self) -> None:
        """In training the outputs are the same, bit for bit."""
        for old, new in _pairs(self.subject.step.outputs, self.step.outputs):
            assert _same(old, new), f'off by {_difference(old, new)}'

    def old_gradients(self) -> None:
        """In training the old parameters have the gradients they had, up to the order in which three are added."""
        assert self.gradient_error < GRADIENT_TOLERANCE, f'off by {self.gradient_error} of their norm'

    @cached_property
    def gradient_error(self) -> float:
        """How far the gradients of all old parameters are from what they were, over their norm.

        Zero if they are the same bit for bit, and otherwise as computed in double precision, where rounding is small.
        """
        old, new = self.subject.step.gradients, self.step.gradients
        if self.subject.images.is_meta or all(_same(gradient, new[name]) for name, gradient in old.items()):
            return 0.0
        images = self.subject.images.double()
        old, new = (
            Step.of(copy.deepcopy(model).double(), images).gradients for model in (self.subject.model, self.model)
        )
        off, norm = (
            torch.stack([tensor.norm() for tensor in tensors]).norm()
            for tensors in ([new[name] - gradient for name, gradient in old.items()], old.values())
        )
        return float(off / norm)


def _record(result: Result, statements: dict[str, Callable[[], None]]) -> None:
    for name, statement in statements.items():
        try:
            statement()
        except Exception as error:  # one that does not hold must not hide the others
            result.failed[name] = f'{type(error).__name__}: {error}'
        else:
            result.held.append(name)


def _pairs(first: list[Tensor], second: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    assert len(first) == len(second), f'{len(first)} outputs became {len(second)}'
    yield from zip(first, second)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN; on meta, whether they look alike."""
    if first.is_meta or second.is_meta:
        return first.shape == second.shape and first.dtype == second.dtype
    return torch.equal(first, second) or (first.shape == second.shape and torch.allclose(first, second, 0, 0, True))


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max())
