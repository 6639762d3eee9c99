"""A model that is patched and undone in any order, beside the base it must be again."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sem_timm
from sem_timm import SemTimmError
from sem_timm.surgery.freeze import unread_parameters
from sem_timm.surgery.rewrite import edit_of
from tests.families import FAMILIES
from tests.robustness.arguments import IDENTITIES, OTHERS, SIZES, operations, targets
from tests.robustness.runs import same
from tests.snapshot import assert_same, snapshot
from tests.twins import trained

NAMES = ('resnet', 'vit_registers', 'convnext', 'efficientnet', 'swin')
_BASES: dict[str, nn.Module] = {}


class PatchedModel(RuleBasedStateMachine):
    """A model and a base, to which everything is done but the patches."""

    @initialize(name=st.sampled_from(NAMES), operation=st.sampled_from([None, *IDENTITIES, *OTHERS]))
    def start(self, name: str, operation: Any) -> None:
        self.family = FAMILIES[name]
        if name not in _BASES:
            _BASES[name] = self.family.create()
        self.base = copy.deepcopy(_BASES[name])
        self.model = copy.deepcopy(self.base)
        self.is_identity, self.dropped = True, False
        self.plan: sem_timm.Plan | None = None
        if operation is not None:
            self.patch_with(operation)

    @rule(data=st.data(), operation=operations(), size=st.sampled_from(SIZES), strict=st.integers(0, 5))
    def patch(self, data: st.DataObject, operation: Any, size: Any, strict: int) -> None:
        """A patch is all there or not at all."""
        target, exclude = data.draw(targets(self.model)), data.draw(st.one_of(st.none(), targets(self.model)))
        before = snapshot(self.model)
        with self.unchanged_after_an_error(raises_warnings=strict == 0):
            plan = sem_timm.plan_model(
                self.model, operation[0], target=target, exclude=exclude, input_size=size, **operation[1]
            )
            assert_same(before, snapshot(self.model))
            self.plan = plan
            self.apply(plan)

    @rule(operation=st.sampled_from([*IDENTITIES, *OTHERS]))
    def patch_all(self, operation: Any) -> None:
        """A patch of all that can take it."""
        self.patch_with(operation)

    def patch_with(self, operation: Any) -> None:
        with self.unchanged_after_an_error():
            self.apply(sem_timm.plan_model(self.model, operation[0], **operation[1]))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def apply_an_old_plan(self) -> None:
        """A plan that was made for this model, or for one of which it is a copy, before other things happened."""
        with self.unchanged_after_an_error():
            assert self.plan is not None
            self.apply(self.plan)

    def apply(self, plan: sem_timm.Plan) -> None:
        already = {part.name for part in sem_timm.patched_modules(self.model)}
        sem_timm.patch_model(self.model, plan)
        now = {part.name for part in sem_timm.patched_modules(self.model)}
        assert now == already | plan.edits.keys() and not already & plan.edits.keys()
        assert all(hasattr(self.model.get_submodule(site.name), site.attribute) for site in plan)
        self.is_identity &= plan.operation.is_identity or type(plan.operation).__name__ == 'InsertConfig'

    @rule()
    def undo(self) -> None:
        """Undoing gives the base again, or is an error if there is nothing to undo."""
        if self.dropped or not sem_timm.patched_modules(self.model):
            before = snapshot(self.model)
            try:
                sem_timm.unpatch_model(self.model)
            except SemTimmError:
                assert_same(before, snapshot(self.model))
                return
            raise AssertionError('undone without a patch')
        sem_timm.unpatch_model(self.model)
        self.is_identity = True
        assert_looks_like(self.base, self.model)

    @rule()
    def save_and_load(self) -> None:
        """A saved patch, put into the base, gives the patched model."""
        twin = copy.deepcopy(self.base)
        with tempfile.TemporaryDirectory() as folder, self.unchanged_after_an_error():
            before = snapshot(self.model)
            sem_timm.save_patch(self.model, Path(folder) / 'patch')
            assert_same(before, snapshot(self.model))
            sem_timm.load_patch(twin, Path(folder) / 'patch', check_base='error')
            assert [*twin.state_dict()] == [*self.model.state_dict()]
            assert all(map(same, self.outputs(twin), self.outputs(self.model)))
            sem_timm.unpatch_model(twin)
            assert_looks_like(self.base, twin)

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how: Any) -> None:
        self.model = how(self.model)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.base.to(dtype)
        self.model.to(dtype)

    @rule(training=st.booleans())
    def change_mode(self, training: bool) -> None:
        self.base.train(training)
        self.model.train(training)

    @precondition(lambda self: not unread_parameters(self.model))
    @rule(requires_grad=st.booleans())
    def freeze(self, requires_grad: bool) -> None:
        self.base.requires_grad_(requires_grad)
        self.model.requires_grad_(requires_grad)

    @rule()
    def train(self) -> None:
        """New modules get other values."""
        if sem_timm.patched_modules(self.model):
            trained(self.model)
            self.is_identity = False

    @rule()
    def switch_off(self) -> None:
        """Switched off, the model is its base."""
        expected = self.outputs(self.base)
        before = snapshot(self.model)
        with self.unchanged_after_an_error(), sem_timm.disabled(self.model):
            if not self.dropped:
                assert all(map(same, expected, self.outputs(self.model)))
        assert_same(before, snapshot(self.model), random_state=False)

    @rule()
    def drop_what_is_unread(self) -> None:
        with self.unchanged_after_an_error():
            unread = unread_parameters(self.model)
            sem_timm.drop_unread_parameters(self.model)
            self.dropped |= bool(unread)

    @rule(batch_size=st.integers(1, 3))
    def run(self, batch_size: int) -> None:
        """As the base as long as all that was inserted is an identity."""
        if self.is_identity:
            expected = self.outputs(self.base, batch_size)
            assert all(map(same, expected, self.outputs(self.model, batch_size)))

    @invariant()
    def classes_and_keys_agree(self) -> None:
        """A module is patched if and only if it is listed, and the base is inside with all its keys in order."""
        if not hasattr(self, 'model'):
            return
        listed = {part.name: part for part in sem_timm.patched_modules(self.model)}
        names = dict(self.base.named_modules())
        inserted = tuple(f'{part.name}.{child}' for part in listed.values() for child in part.inserted)
        for name, module in self.model.named_modules():
            edit = edit_of(module)
            assert (edit is not None) == (name in listed), name
            if name in names:
                assert type(module) is type(names[name]) or (edit is not None and edit.base is type(names[name]))
                own = [child for child in module._modules if edit is None or child not in edit.inserted]
                assert own == [*names[name]._modules] and ('_surgery_notes' in module.__dict__) == (edit is not None)
            else:
                assert f'{name}.'.startswith(tuple(f'{child}.' for child in inserted)), name
        if not self.dropped:
            known = self.base.state_dict()
            assert [*known] == [key for key in self.model.state_dict() if key in known]

    def outputs(self, model: nn.Module, batch_size: int = 2) -> list[Any]:
        training = model.training
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            outputs = tree_leaves(model.eval()(self.family.images(batch_size).to(dtype)))
        model.train(training)
        return outputs

    @contextmanager
    def unchanged_after_an_error(self, *, raises_warnings: bool = False) -> Iterator[None]:
        """Any error is one of ours, or the warning that was made one, and leaves the model as it was."""
        before = snapshot(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter('error' if raises_warnings else 'ignore', sem_timm.SwapWarning)
            try:
                yield
            except (SemTimmError, sem_timm.SwapWarning):
                assert_same(before, snapshot(self.model))


def assert_looks_like(base: nn.Module, model: nn.Module) -> None:
    """Same modules of the same classes with the same attributes, flags and values; only identities may differ."""
    ones, others = dict(base.named_modules()), dict(model.named_modules())
    assert [*ones] == [*others]
    for name, one in ones.items():
        other = others[name]
        assert type(one) is type(other) and one.training == other.training, name
        assert [*one.__dict__] == [*other.__dict__], name
    pairs = zip(tensors_of(base), tensors_of(model), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name and one.requires_grad == other.requires_grad, name
        assert same(one.detach(), other.detach()), name


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
