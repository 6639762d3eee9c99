"""What a model costs, stage by stage, before it was patched and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sem_timm.errors import ModelError
from sem_timm.meta import probe, weightless
from sem_timm.random_state import preserved_random_state
from sem_timm.reports.costs import Cost, measured
from sem_timm.surgery import check_model, patched_modules, unpatch_model, unread_parameters
from sem_timm.tables import table

# What no child of the model computes or holds.
_OWN = '(model)'


@dataclass(frozen=True)
class StageCost:
    """One stage, or another part of the model, before it was patched and now.

    Attributes:
        name: Name of the part in the model.
        base: What it cost before.
        patched: What it costs now.
    """

    name: str
    base: Cost
    patched: Cost


@dataclass(frozen=True, repr=False)
class Summary:
    """What a model costs for one image, base against patched; prints as a table.

    Attributes:
        model_name: Class of the model.
        input_size: Shape (C, H, W) of the image.
        is_patched: Whether there is a difference to be seen.
        stages: The stages that timm names, and the model's other parts, in the order of ``named_modules``.
        unread_parameters: Parameters that no longer reach the output, which ``drop_unread_parameters`` would drop.
    """

    model_name: str
    input_size: tuple[int, ...]
    is_patched: bool
    stages: tuple[StageCost, ...]
    unread_parameters: int = 0

    @property
    def base(self) -> Cost:
        """The whole model before it was patched."""
        return sum((stage.base for stage in self.stages), Cost())

    @property
    def patched(self) -> Cost:
        """The whole model now."""
        return sum((stage.patched for stage in self.stages), Cost())

    def to_dict(self) -> dict[str, Any]:
        """The summary as data that `json.dumps` takes."""
        return {
            'model': self.model_name,
            'input_size': list(self.input_size),
            'is_patched': self.is_patched,
            'base': asdict(self.base),
            'patched': asdict(self.patched),
            'unread_parameters': self.unread_parameters,
            'stages': [asdict(stage) for stage in self.stages],
        }

    def __repr__(self) -> str:
        whole = StageCost('all', self.base, self.patched)
        rows = [self._row(stage) for stage in (*self.stages, whole)]
        units = 'parameters', 'MACs', 'activations'
        header = [text for unit in units for text in ((unit, 'patched') if self.is_patched else (unit,))]
        lines = table(['stage', *header], rows)
        lines.insert(-1, lines[1])
        if self.is_patched:
            pairs = zip(asdict(whole.base).values(), asdict(whole.patched).values())
            changes = [f'{now / before - 1:+.2%}' if before else '–' for before, now in pairs]
            lines.append('Patched against base: ' + ', '.join(map(' '.join, zip(units, changes))) + '.')
        size = ' x '.join(map(str, self.input_size))
        lines.append(
            f'{self.model_name}, one image at {size}. MACs: convolutions, matrix products and attention of a forward. '
            'Activations: what a training forward keeps for the backward pass.'
        )
        if self.unread_parameters:
            lines.append(
                f'{self.unread_parameters:,} parameters are no longer read; drop_unread_parameters drops them.'
            )
        return '\n'.join(lines)

    def _row(self, stage: StageCost) -> list[str]:
        row = [stage.name]
        for key, text in (('parameters', _count), ('macs', _millions), ('activation_bytes', _mib)):
            row.append(text(getattr(stage.base, key)))
            if self.is_patched:
                row.append(text(getattr(stage.patched, key)))
        return row


def summary(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Summary:
    """Counts parameters, MACs and activation memory of a model per stage, before it was patched and now.

    Measured on weightless copies on the meta device, with torch's counter of operations, without gradient
    checkpointing, and with the parameters frozen that are frozen now: no weight is read, and the model stays as it is.

    Args:
        model: A model, patched or not.
        input_size: Shape (C, H, W) of one image, where the model does not say.

    Returns:
        The summary; printing it shows a table.

    Raises:
        ModelError: If the model is wrapped, lost its unread parameters or does not run on the meta device.
        OptionError: If it does not accept ``input_size``.
    """
    check_model(model)
    # Within inference mode nothing is kept for a backward pass.
    with preserved_random_state(), torch.inference_mode(False):
        size = probe(model, input_size).input_size
        part_of = _parts(model)
        is_patched = bool(patched_modules(model))
        now = measured(_skeleton(model), size, part_of)
        before = measured(_base(model), size, part_of) if is_patched else now
    parts = [name for name in now if now[name] != Cost() or before.get(name, Cost()) != Cost()]
    stages = tuple(StageCost(name, before.get(name, Cost()), now[name]) for name in parts)
    return Summary(type(model).__name__, size, is_patched, stages, _unread(model))


def _skeleton(model: nn.Module) -> nn.Module:
    """A weightless copy in which the same parameters require gradients, and nothing is computed twice."""
    copy = weightless(model)
    for twin, parameter in zip(copy.parameters(), model.parameters()):
        twin.requires_grad_(parameter.requires_grad)
    set_checkpointing = getattr(copy, 'set_grad_checkpointing', None)
    if callable(set_checkpointing):
        try:
            set_checkpointing(False)
        except Exception:  # some of timm's models assert that nobody asks
            return copy
    return copy


def _base(model: nn.Module) -> nn.Module:
    try:
        return unpatch_model(_skeleton(model))
    except ModelError as error:
        raise ModelError(f'what {type(model).__name__} was before cannot be told: {error}') from error


def _unread(model: nn.Module) -> int:
    """How many parameters `drop_unread_parameters` would drop."""
    unread = unread_parameters(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in unread)


def _parts(model: nn.Module) -> Callable[[str], str]:
    """Which part a module belongs to: the children of the model; of one that holds timm's stages, its own children."""
    stages = _stage_names(model)
    divided = {name.partition('.')[0] for name in stages if '.' in name}

    def part_of(name: str) -> str:
        first, _, rest = name.partition('.')
        if not first:
            return _OWN
        return f'{first}.{rest.partition(".")[0]}' if first in divided and rest else first

    return part_of


def _stage_names(model: nn.Module) -> list[str]:
    info = getattr(model, 'feature_info', None) or ()
    entries = getattr(info, 'info', info)
    names = [entry.get('module', '') for entry in entries if isinstance(entry, dict)]
    known = {name for name, _ in model.named_modules()}
    return [name for name in names if name in known]


def _count(value: int) -> str:
    return f'{value:,}'


def _millions(value: int) -> str:
    return f'{value / 1e6:,.2f} M'


def _mib(value: int) -> str:
    return f'{value / 2**20:,.2f} MiB'
