"""Folding: the mean of each gate, or a scale and shift, goes into the layer before it; the model is timm's again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.batches import Loader
from sem_timm.errors import ModelError, OptionError
from sem_timm.folding.constant import Constant, Constantly, difference, holder
from sem_timm.folding.measure import Folded, Pass, calls_of, observed, run
from sem_timm.folding.moments import GateMoments
from sem_timm.folding.result import FoldResult, GateFold
from sem_timm.folding.undo import undone_on_error
from sem_timm.layers import ChannelGate, ScaleAndShift
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.random_state import preserved_random_state
from sem_timm.registry import base_architecture, base_arguments
from sem_timm.reports.isolation import isolated
from sem_timm.surgery import FactorPlace, PatchedModule, factor_places, patched_modules, unpatch_modules

# How far the logits with folded weights may be from those with constant gates, relative to their norm: rounding that a
# deep network makes larger. That a layer takes a factor is compared more closely, block by block.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE = 2e-1


def fold_gates(
    model: nn.Module,
    images: Loader,
    *,
    max_loss: float | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
) -> FoldResult:
    """Folds gates, and scales and shifts, into the weights of the layers before them.

    The authors of SEM found that gates tend to constants, and folded these into norms: ASR,
    https://arxiv.org/abs/2304.06345. Here each gate becomes its mean over images, and the mean of each channel is
    multiplied into what comes before the sum: a norm, layer scale, linear layer or convolution. The model is timm's
    plain network then, with the same keys and no part of this package. A gate that is one everywhere leaves all weights
    and outputs as they are, bit for bit. 'ssf' is the same for all images, and its fold loses nothing; the shift goes
    into the bias of that layer, if it has one, as published, https://arxiv.org/abs/2210.08823.

    That a layer takes the factor and shift is read from the forwards and then tried in numbers; where it does not, or
    there is no such layer, the gate stays as it is, and the result says why. If one gate of a block is folded and
    another stays, the folded one becomes an exact identity there.

    Works in place. The model runs in eval mode, on a copy that has no hooks: modes, hooks, gradients' flags and random
    generators stay as they are. If anything fails, the model is what it was.

    Args:
        model: A model with gates, or 'ssf', that `patch_model` has put in, or a variant such as ``resnet50_sem``.
        images: Yields batches of normalised images (B, C, H, W), pairs of images and labels, or dictionaries, of the
            kind that the model is for. With labels the accuracy is measured before and after, with a second pass.
        max_loss: Fold only gates whose loss is not above it, such as 0.01; see `GateFold.loss`. By default all.
        max_batches: Look at so many batches at most.
        device: Where to run; by default where the model is. The model is not moved.

    Returns:
        What became of each gate; printing it shows a table.

    Raises:
        ModelError: If the model has no gates that were put in, is wrapped or has no weights, or if some are not finite.
        OptionError: If an option is out of range, or the loader yields no images or no classes as labels.
    """
    is_number = isinstance(max_loss, (int, float)) and not isinstance(max_loss, bool)
    if max_loss is not None and not (is_number and max_loss >= 0):
        raise OptionError(f'max_loss={max_loss!r}: it is a relative error of 0 or more, such as 0.01; None folds all.')
    if max_batches is not None:
        check_at_least_one('max_batches', max_batches)
    with preserved_random_state(), torch.inference_mode(False), torch.no_grad():
        copy = isolated(model, device)
        parts = patched_modules(model)
        gates = _gates(copy, parts)
        if not gates:
            raise ModelError(_nothing(model, parts))
        with observed({name: gate.module for name, gate in gates.items()}) as moments:
            before = run(copy, images, max_batches)
        work = _Work(model, copy, parts, gates, moments, before)
        rows = work.decide(max_loss)
        after = before
        if any(row.folded for row in rows):
            work.fold_copy(rows)
            after = before if before.right is None else _again(copy, images, max_batches, before)
            work.commit(rows)
        is_plain = not patched_modules(model)
    return FoldResult(
        model_name=type(model).__name__,
        num_images=before.num_images,
        gates=tuple(rows),
        is_plain=is_plain,
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
    )


@dataclass(frozen=True)
class _Gate:
    """A gate of the copy, and its place in the patched module."""

    part: PatchedModule
    attribute: str
    module: Folded


def _gates(copy: nn.Module, parts: tuple[PatchedModule, ...]) -> dict[str, _Gate]:
    found = {}
    for part in parts:
        for attribute in part.inserted if part.position != 'core' else ():
            name = f'{part.name}.{attribute}' if part.name else attribute
            module = copy.get_submodule(name)
            if isinstance(module, Folded) and type(module).forward in (ChannelGate.forward, ScaleAndShift.forward):
                found[name] = _Gate(part, attribute, module)
    return found


def _constant(module: Folded, seen: GateMoments) -> Constant:
    """What a module does to all images, or on average."""
    if isinstance(module, ScaleAndShift) and module.shift.any():
        return Constant(seen.mean, module.shift.detach().cpu().double())
    return Constant(seen.mean)


def _nothing(model: nn.Module, parts: tuple[PatchedModule, ...]) -> str:
    others = ', '.join(dict.fromkeys(str(part.operation) for part in parts))
    has = f' It has {others}, which multiply by no gate per channel.' if others else ''
    return (
        f'{type(model).__name__} has no gates that patch_model put in, so that there is nothing to fold.{has}\n'
        "  sem_timm.patch_model(model, 'sem') puts them in; train the model, and fold it then."
    )


def _again(model: nn.Module, images: Loader, max_batches: int | None, before: Pass) -> Pass:
    try:
        after = run(model, images, max_batches)
    except OptionError:
        after = Pass()
    if after.num_images != before.num_images:
        raise OptionError(
            f'the loader yields {after.num_images} images when passed over again, and yielded {before.num_images} '
            'before; give one that can be, such as a DataLoader or a list of batches, not a generator.'
        )
    return after


class _Work:
    """One folding: decided and done on a copy first."""

    def __init__(
        self,
        model: nn.Module,
        copy: nn.Module,
        parts: tuple[PatchedModule, ...],
        gates: dict[str, _Gate],
        moments: dict[str, GateMoments],
        first_pass: Pass,
    ) -> None:
        self.model, self.copy, self.parts = model, copy, parts
        self.gates, self.moments, self.images = gates, moments, first_pass.first
        self.places = {(place.module, place.attribute): place for place in factor_places(model)}
        self.constants = {name: _constant(gates[name].module, seen) for name, seen in moments.items()}

    def decide(self, max_loss: float | None) -> list[GateFold]:
        """A row for each child that was put in, folded or not; the copy is not changed."""
        wanted = [place for name, gate in self.gates.items() if (place := self._place(gate)).parameters]
        calls = calls_of(self.copy, {holder(place) for place in wanted}, self.images)
        rows = [self._row(part, child, max_loss, calls) for part in self.parts for child in part.inserted]
        staying = {row.module for row in rows if not row.folded}
        return [self._beside(row) if row.folded and row.module in staying else row for row in rows]

    def _place(self, gate: _Gate) -> FactorPlace:
        return self.places[gate.part.name, gate.attribute]

    def _row(self, part: PatchedModule, child: str, max_loss: float | None, calls: dict[str, Any]) -> GateFold:
        row = GateFold(part.name, child)
        name = row.name
        if part.position == 'core':
            return replace(row, reason=f'{part.operation} took the place of self-attention, and is no factor')
        if name not in self.gates:
            return replace(row, reason=f'{part.operation} is no gate per channel, whose mean could be folded')
        gate, place = self.gates[name], self._place(self.gates[name])
        row = replace(row, channels=gate.module.channels, layers=place.layers, kind=place.kind)
        if name not in self.moments:
            return replace(row, reason="the model's forward did not run it")
        constant, seen = self.constants[name], self.moments[name]
        row = replace(row, mean=float(seen.mean.mean()), explained=seen.explained, loss=seen.loss)
        reason = place.reason and f'there is no layer to fold it into: {place.reason}'
        if not reason and constant.shift is not None and not place.biases:
            has_bias = any(entry.name.endswith('.bias') for entry in place.parameters)
            why = 'what stands behind passes a factor on and no shift' if has_bias else 'without a bias'
            reason = f'its shift has no place: {", ".join(place.layers)} is a {place.kind}, {why}'
        if not reason and max_loss is not None and seen.loss > max_loss:
            reason = f'its loss is above max_loss={max_loss:g}'
        if not reason:
            call = calls.get(holder(place))
            tried = call and difference(self.copy, place, call, gate.module.channel_dim, constant)
            reason = 'its block was not run' if tried is None else tried
        return replace(row, folded=not reason, reason=reason)

    def _beside(self, row: GateFold) -> GateFold:
        """A gate that is folded in a block where another one stays."""
        gate = self.gates[row.name].module
        if not gate.can_be_identity:
            return replace(row, folded=False, reason='something else of its block stays, and it can be no identity')
        return replace(row, reason='folded, and an identity there as long as something else of its block stays')

    def fold_copy(self, rows: list[GateFold]) -> None:
        """Folds the copy, and compares it with one whose gates are constants.

        Raises:
            ModelError: If they differ.
        """
        for name, row in self._folded(rows):
            gate = self.gates[name].module
            constantly = Constantly(self.constants[name], gate.channel_dim)
            self.copy.get_submodule(row.module)._modules[row.attribute] = constantly
        expected = self.copy(self.images)
        for name, row in self._folded(rows):
            self.constants[name].put(self.copy, self._place(self.gates[name]))
            self.copy.get_submodule(row.module)._modules[row.attribute] = self.gates[name].module
        _take_out(self.copy, rows, {name: self.gates[name].module for name, _ in self._folded(rows)})
        _compare(expected, self.copy(self.images))

    def commit(self, rows: list[GateFold]) -> None:
        """Does to the model what was done to the copy, all of it or nothing."""
        new: dict[str, Tensor] = {}
        for name, _ in self._folded(rows):
            place = self._place(self.gates[name])
            for entry in place.parameters:
                old = new.get(entry.name, self.model.get_parameter(entry.name))
                new[entry.name] = self.constants[name].folded(old, place, entry)
        gates = {name: self.model.get_submodule(name) for name, _ in self._folded(rows)}
        held = [tensor for gate in gates.values() for tensor in (*gate.parameters(), *gate.buffers())]
        with undone_on_error(self.model, [*map(self.model.get_parameter, new), *held]):
            for key, value in new.items():
                self.model.get_parameter(key).copy_(value)
            _take_out(self.model, rows, gates)
            if not patched_modules(self.model):
                _forget_variant(self.model)

    def _folded(self, rows: list[GateFold]) -> Iterator[tuple[str, GateFold]]:
        for row in rows:
            if row.folded:
                yield row.name, row


def _take_out(model: nn.Module, rows: list[GateFold], gates: dict[str, Any]) -> None:
    """Unpatches the modules of which all was folded, and makes identities of folded gates beside others."""
    staying = {row.module for row in rows if not row.folded}
    for name, gate in gates.items():
        if name.rpartition('.')[0] in staying:
            gate.become_identity()
    unpatch_modules(model, {row.module for row in rows if row.folded} - staying)


def _compare(expected: Any, given: Any) -> None:
    if not isinstance(expected, Tensor) or not isinstance(given, Tensor):
        return
    expected_in_full = expected.cpu().double()
    error = float((expected_in_full - given.cpu().double()).norm() / expected_in_full.norm().clamp_min(1e-30))
    if not error <= _TOLERANCES.get(expected.dtype, _COARSE):
        raise ModelError(
            f'with its gates in the weights the model gives other outputs than with constant gates, by {error:.1%}: '
            'something in it reads those weights beside the blocks. Nothing was folded.'
        )


def _forget_variant(model: Any) -> None:
    """Lets a variant say that it is its base: under that name it is saved, and created again."""
    record = getattr(model, 'pretrained_cfg', None)
    name = record.get('architecture') or '' if isinstance(record, dict) else ''
    base = base_architecture(name)
    if base == name:
        return
    assert isinstance(record, dict)
    model.pretrained_cfg = model.default_cfg = {**record, 'architecture': base}
    model._model_args = base_arguments(name, getattr(model, '_model_args', {}))
