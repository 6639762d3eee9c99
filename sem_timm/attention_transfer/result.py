"""What a transfer came to, as a table and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.tables import table


@dataclass(frozen=True)
class Stage:
    """The model after one stage.

    Attributes:
        name: 'original', 'swap', 'initialize', 'match', 'features' or 'distill'.
        errors: For each swapped layer, on the original's inputs: the root mean square of the difference to the
            original's output, as a part of the standard deviation of that; 1 is what the best constant would give.
        accuracy: In percent; None without labels.
        images_seen: Images drawn from the loader by this stage, those drawn again counted again.
        seconds: Time it took.
        losses: Loss of each step.
        sharpness: The factors on the memories of keys that were chosen for each head, by core.
    """

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    images_seen: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = field(default=(), repr=False)
    sharpness: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def mean_error(self) -> float | None:
        """The mean of the errors of the layers."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else None


@dataclass(frozen=True, repr=False)
class TransferResult:
    """What a transfer came to; prints as a table.

    Attributes:
        model_name: Class of the model.
        operation: The attention that was put in.
        options: How it was transferred.
        stages: The model before, swapped, and after each stage.
        trained: Number of parameters that were trained.
    """

    model_name: str
    operation: str
    options: TransferOptions
    stages: tuple[Stage, ...]
    trained: int

    def __getitem__(self, name: str) -> Stage:
        """The stage of a name."""
        return next(stage for stage in self.stages if stage.name == name)

    def won_back(self, name: str) -> float | None:
        """The part of the accuracy lost by the swap that a stage has won back; None if none is known or was lost."""
        before, lowest, now = (self[stage].accuracy for stage in ('original', 'swap', name))
        if before is None or lowest is None or now is None or before == lowest:
            return None
        return (now - lowest) / (before - lowest)

    def to_dict(self) -> dict[str, Any]:
        """The result as data that `json.dumps` takes."""
        stages = [
            {**asdict(stage), 'mean_error': stage.mean_error, 'won_back': self.won_back(stage.name)}
            for stage in self.stages
        ]
        return {
            'model': self.model_name,
            'operation': self.operation,
            'trained': self.trained,
            'options': asdict(self.options),
            'stages': stages,
        }

    def __repr__(self) -> str:
        names = list(self.stages[-1].errors)
        rows = [('relative error', *(stage.name for stage in self.stages))]
        rows += [(name, *(_number(stage.errors.get(name), '.3f') for stage in self.stages)) for name in names]
        rows += [
            ('mean', *(_number(stage.mean_error, '.3f') for stage in self.stages)),
            ('accuracy %', *(_number(stage.accuracy, '.2f') for stage in self.stages)),
            ('won back %', *(_number(self._percent(stage.name), '.1f') for stage in self.stages)),
            ('images seen', *(_number(stage.images_seen or None, ',d') for stage in self.stages)),
            ('seconds', *(_number(stage.seconds or None, '.1f') for stage in self.stages)),
        ]
        rows = [row for row in rows if any(row[1:])]
        lines = table(rows[0], rows[1:])
        lines.append(f'{self.operation} on {self.model_name}: {self.trained:,} parameters trained.')
        return '\n'.join(lines)

    def _percent(self, name: str) -> float | None:
        part = self.won_back(name) if name not in ('original', 'swap') else None
        return None if part is None else 100 * part


def _number(value: float | None, form: str) -> str:
    return '' if value is None else format(value, form)
