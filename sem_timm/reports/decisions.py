"""Which excitation each block chooses: statistics of SEM's decisions and gates over real data."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.batches import Loader
from sem_timm.errors import ModelError, OptionError
from sem_timm.layers import SEM, Excitation
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.meta import dtype_of
from sem_timm.random_state import preserved_random_state
from sem_timm.reports.image_shape import explained_shape
from sem_timm.reports.isolation import device_of, isolated
from sem_timm.reports.labels import labelled_batches
from sem_timm.reports.moments import Moments
from sem_timm.reports.pictures import Panel, check_path, heatmaps
from sem_timm.tables import table


@dataclass(frozen=True, eq=False, repr=False)
class Decisions:
    """What the Switchable Excitation Modules of a model decide, over a set of images.

    All tensors are (blocks, operators) in float64, and NaN where a block has not that operator. Standard deviations are
    those of the population. Prints as a table, converts to plain data with `to_dict`, and is drawn by `plot`.

    Attributes:
        model_name: Class of the model.
        blocks: Names of the blocks, in the order of ``named_modules``.
        operators: Names of the operators.
        forms: The form of each block's gate, 'identity' or 'paper'.
        num_images: Number of images.
        mean: Mean decision: how much the operator's logits count, between 0 and 1.
        spread: Standard deviation of the decision over the images.
        gate_mean: Mean of the operator's factor in the gate, over images and channels. An operator without a say has
            the factor 1 in the identity form, 0.5 in the paper's.
        gate_spread: Standard deviation over the images of that factor's mean over channels.
        gate_contrast: Standard deviation of the factor over the channels, as a mean over images: how differently the
            operator treats channels.
        classes: The same for the images of each class, by label, if asked for.
    """

    model_name: str
    blocks: tuple[str, ...]
    operators: tuple[str, ...]
    forms: tuple[str, ...]
    num_images: int
    mean: Tensor
    spread: Tensor
    gate_mean: Tensor
    gate_spread: Tensor
    gate_contrast: Tensor
    classes: Mapping[Hashable, Decisions] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The operator with the largest mean decision of each block."""
        return tuple(self.operators[int(row.nan_to_num(-1.0).argmax())] for row in self.mean)

    @property
    def class_spread(self) -> Tensor:
        """Standard deviation of the mean decision over the classes (blocks, operators), each class counting the same.

        Raises:
            OptionError: If the statistics were not taken by class.
        """
        if not self.classes:
            raise OptionError('these statistics were not taken by class: decisions(model, loader, by_class=True).')
        return torch.stack([one.mean for one in self.classes.values()]).std(0, correction=0)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as data that `json.dumps` takes; None where a block has not that operator."""
        statistics = ('mean', 'spread', 'gate_mean', 'gate_spread', 'gate_contrast')
        return {
            'model': self.model_name,
            'num_images': self.num_images,
            'operators': list(self.operators),
            'blocks': list(self.blocks),
            'forms': list(self.forms),
            'chosen': list(self.chosen),
            **{name: _plain(getattr(self, name)) for name in statistics},
            **({'classes': {str(label): one.to_dict() for label, one in self.classes.items()}} if self.classes else {}),
        }

    def plot(self, path: str | Path) -> Path:
        """Draw heatmaps of blocks × operators: decisions, gates, and the spread between classes where there are any.

        Args:
            path: File to write, by its ending a PNG, SVG or PDF.

        Returns:
            The path.

        Raises:
            OptionError: If the ending is another one or the folder does not exist.
            MissingPackageError: If matplotlib is not installed.
        """
        path = check_path(path)
        neutral = {'identity': 1.0, 'paper': 0.5}[self.forms[0]] if len(set(self.forms)) == 1 else None
        panels = [
            Panel('Decision', 'weight of the operator, 0 to 1', self.mean, self.spread),
            Panel('Gate', _gate_label(neutral), self.gate_mean, self.gate_spread, neutral),
        ]
        if self.classes:
            label = f'standard deviation over {len(self.classes)} classes'
            panels.append(Panel('Decision between classes', label, self.class_spread))
        title = f'SEM in {self.model_name}: mean ± standard deviation over {self.num_images:,} images'
        heatmaps(path, panels, self.blocks, self.operators, title)
        return path

    def __repr__(self) -> str:
        header = ['block', 'chosen', *self.operators, *(f'{name} gate' for name in self.operators)]
        pairs = (torch.cat((self.mean, self.gate_mean), 1), torch.cat((self.spread, self.gate_spread), 1))
        cells = [[_cell(*pair) for pair in zip(*rows)] for rows in zip(*(part.tolist() for part in pairs))]
        lines = table(header, [[*names, *row] for *names, row in zip(self.blocks, self.chosen, cells)], left=2)
        lines.append(
            f'SEM in {self.model_name}: mean ± standard deviation over {self.num_images:,} images. First how much '
            'each operator counts, from 0 to 1; then its factor in the gate.'
        )
        if self.classes:
            lines += ['', *self._between_classes()]
        return '\n'.join(lines)

    def _between_classes(self) -> list[str]:
        """Lines of a table of the classes with the lowest and the highest mean decision."""
        labels = list(self.classes)
        means = torch.stack([one.mean for one in self.classes.values()])
        rows = []
        for index, block in enumerate(self.blocks):
            row = [block]
            for column in means[:, index].unbind(1):
                low, high = int(column.argmin()), int(column.argmax())
                values = f'{labels[low]}: {column[low]:.3f} … {labels[high]}: {column[high]:.3f}'
                row.append('–' if column.isnan().any() else values)
            rows.append(row)
        lines = table(['block', *self.operators], rows)
        return [*lines, f'The classes with the lowest and the highest mean decision, of {len(labels)}.']


def decisions(
    model: nn.Module,
    loader: Loader,
    *,
    by_class: bool = False,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
) -> Decisions:
    """Measures which excitation each block of a model with SEM chooses, over real data.

    The model runs in eval mode, on a copy around its own weights that has no hooks: modes, caches, hooks and random
    generators stay as they are. Memory does not grow with the number of images.

    Args:
        model: A model with modules of class `SEM`, patched in or built in.
        loader: Yields batches of normalised images (B, C, H, W), pairs of images and labels, or dictionaries.
        by_class: Whether to take the statistics for each class too.
        max_batches: Look at so many batches at most.
        device: Where to run; by default where the model is. The model is not moved.

    Returns:
        The statistics.

    Raises:
        ModelError: If the model has no SEM, or none of them is run.
        OptionError: If the loader yields no images, or no labels that ``by_class`` could use.
    """
    if max_batches is not None:
        check_at_least_one('max_batches', max_batches)
    with preserved_random_state():
        copy = isolated(model, device)
        modules = _sem_modules(copy)
        recorder = _Recorder(modules)
        where, dtype = device_of(copy), dtype_of(copy)
        num_images, per_class = 0, dict[Hashable, int]()
        with torch.no_grad():
            for images, labels in labelled_batches(loader, with_labels=by_class, max_batches=max_batches):
                with explained_shape(copy, images):
                    copy(images.to(where, dtype, non_blocking=True))
                recorder.flush(labels)
                num_images += len(images)
                for label in labels or ():
                    per_class[label] = per_class.get(label, 0) + 1
    ran = {name: module for name, module in modules.items() if name in recorder.everything}
    if not ran:
        raise ModelError(f'none of the {len(modules)} SEM of this {type(model).__name__} was run by its forward.')
    name = type(model).__name__
    classes = {label: _statistics(name, ran, recorder.classes[label], per_class[label]) for label in _sorted(per_class)}
    return _statistics(name, ran, recorder.everything, num_images, classes)


def _sem_modules(model: nn.Module) -> dict[str, SEM]:
    """The modules by the names of their blocks; of several in one block, by their own names."""
    everywhere = {name: module for name, module in model.named_modules() if isinstance(module, SEM)}
    found = {name: module for name, module in everywhere.items() if module.decision is not None}
    if not found:
        single = any(isinstance(module, Excitation) for module in model.modules())
        why = ' A single operator, which it has, decides nothing.' if single else ''
        why = " With decision='equal', which it has, nothing is decided." if everywhere else why
        raise ModelError(
            f'{type(model).__name__} has no Switchable Excitation Module that decides.{why}\n'
            "  sem_timm.patch_model(model, 'sem') puts them in; train the model, and look again."
        )
    blocks = [name.rpartition('.')[0] for name in found]
    names = [block if block and blocks.count(block) == 1 else name for block, name in zip(blocks, found)]
    return {name or 'SEM': module for name, module in zip(names, found.values())}


class _Recorder:
    """Takes in what each SEM decides, whenever it is called."""

    def __init__(self, modules: dict[str, SEM]) -> None:
        self.everything: dict[str, Moments] = {}
        self.classes: dict[Hashable, dict[str, Moments]] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        for name, module in modules.items():
            module.register_forward_pre_hook(partial(self._record, name), with_kwargs=True)

    def _record(self, name: str, module: SEM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs['x']
        gates = module.operator_gates(x).float()
        self._waiting.append(
            (name, torch.cat((module.decide(x).float(), gates.mean(-1), gates.std(-1, correction=0)), 1))
        )

    def flush(self, labels: list[Hashable] | None) -> None:
        """Adds what one batch of images showed; rows are decisions, gates and their contrasts, (B, 3n)."""
        for name, rows in self._waiting:
            rows = rows.cpu()
            if not rows.isfinite().all():
                raise ModelError(f'the SEM of {name} gives numbers that are not finite; weights or images are not.')
            _add(self.everything, name, rows)
            if labels is not None and len(rows) != len(labels):
                raise ModelError(f'the SEM of {name} sees {len(rows)} samples of {len(labels)} images; leave by_class.')
            for label in dict.fromkeys(labels or ()):
                assert labels is not None
                chosen = torch.tensor([other == label for other in labels])
                _add(self.classes.setdefault(label, {}), name, rows[chosen])
        self._waiting.clear()


def _add(statistics: dict[str, Moments], name: str, rows: Tensor) -> None:
    statistics.setdefault(name, Moments(rows.shape[1])).update(rows)


def _statistics(
    model_name: str,
    modules: dict[str, SEM],
    moments: dict[str, Moments],
    num_images: int,
    classes: Mapping[Hashable, Decisions] | None = None,
) -> Decisions:
    operators = tuple(dict.fromkeys(name for module in modules.values() for name in module.operators))
    columns = torch.full((5, len(modules), len(operators)), float('nan'), dtype=torch.float64)
    for row, (name, module) in enumerate(modules.items()):
        places = torch.tensor([operators.index(operator) for operator in module.operators])
        mean, gate_mean, contrast = moments[name].mean.chunk(3)
        spread, gate_spread, _ = moments[name].std.chunk(3)
        columns[:, row, places] = torch.stack((mean, spread, gate_mean, gate_spread, contrast))
    forms = tuple(module.form for module in modules.values())
    return Decisions(
        model_name=model_name,
        blocks=tuple(modules),
        operators=operators,
        forms=forms,
        num_images=num_images,
        mean=columns[0],
        spread=columns[1],
        gate_mean=columns[2],
        gate_spread=columns[3],
        gate_contrast=columns[4],
        classes=classes or {},
    )


def _sorted(labels: Mapping[Hashable, int]) -> list[Hashable]:
    try:
        return sorted(labels)  # type: ignore[type-var]
    except TypeError:  # labels of several kinds
        return list(labels)


def _gate_label(neutral: float | None) -> str:
    return 'factor of the operator' + ('' if neutral is None else f', {neutral:g} without a say')


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _cell(mean: float, spread: float) -> str:
    return '–' if mean != mean else f'{mean:.3f} ±{spread:.3f}'
