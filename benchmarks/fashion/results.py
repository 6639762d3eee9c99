"""What the log of trainings on Fashion-MNIST says: settings, their tables, and the page that is made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from common.piped import piped
from common.run_log import Record
from fashion.gates import gates
from fashion.models import FAMILIES
from fashion.reading import Line, longer_trained, order, reading
from fashion.training import AUGMENTATIONS, Setting

_INTRODUCTION = """\
# Results on Fashion-MNIST

Written by `benchmarks/fashion_mnist.py` from its log, whatever came out. 70,000 images of clothes, 28 x 28, in 10
classes. Accuracy is that on the test images **after the last epoch**; neither an epoch nor an option was chosen by it
in this comparison. All variants of a seed start with the same weights but for what is new, and see the same images in
the same order with the same crops. Variants are made by `sem_timm.patch_model`, gates with `init='paper'` but in the
lines that say otherwise. Augmentation *crop-flip* is a random crop of 28 x 28 after padding by 4, and a random mirror
image. Training loss is the mean cross entropy of the last epoch, on the images as they are trained on. ± is the
standard deviation over seeds; *against* is the mean difference of runs with the same seed.

![Accuracy of every run, and the mean over seeds](results.png)
"""

_RECIPES = {
    'resnet': ('SGD with momentum 0.9, a peak learning rate of 0.1', 'weight decay 1e-4 on all parameters'),
    'vit': ('AdamW with a peak learning rate of 2e-3', 'weight decay 0.05'),
}
_SCHEDULES = {
    'cosine': 'cosine schedule with a fifth of an epoch of warm-up',
    'drops': 'a tenth of it after a half of the epochs and again after three quarters, a fifth of an epoch of warm-up',
}


@dataclass(frozen=True)
class Section:
    """All runs of one setting.

    Attributes:
        setting: The setting.
        tables: Lines by augmentation, in the order of the family.
        ratios: Time of a training step against the original's, by variant.
        records: The records of the runs.
        twice: Lines of the original by augmentation, after twice as many epochs.
    """

    setting: Setting
    tables: dict[str, list[Line]]
    ratios: dict[str, float]
    records: list[Record]
    twice: dict[str, Line] = field(default_factory=dict)

    @property
    def alone(self) -> dict[str, Line]:
        """Lines of the original by augmentation, if nothing else was trained."""
        lines = {name: one[0] for name, one in self.tables.items() if len(one) == 1}
        names = {line.name for line in lines.values()}
        return lines if len(lines) == len(self.tables) and names == {self.setting.original.name} else {}

    @property
    def network(self) -> str:
        """What is trained."""
        depth = self.setting.depth
        if self.setting.family == 'vit':
            return f'Vision transformer of {depth} blocks'
        if not self.setting.has_bottlenecks:
            return f'ResNet-{depth}'
        stride = ', stride 2' if self.setting.stem_stride == 2 else ''
        return f'ResNet-{depth} of bottlenecks{stride}'

    @property
    def title(self) -> str:
        """The heading; trainings of bottlenecks are told by their epochs, too."""
        return f'{self.network}, {self.setting.epochs} epochs' if self.setting.has_bottlenecks else self.network


def sections(records: Iterable[Record]) -> list[Section]:
    """The settings of a log: the residual networks first, of these the longest trainings.

    Trainings of the original alone with twice as many epochs as another setting belong to that one.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record['setting'], sort_keys=True), []).append(record)
    found = [_section(Setting(**json.loads(key)), group) for key, group in groups.items()]
    found = [section for section in found if section.tables]
    longer = {section.setting: section for section in found if section.alone}
    told_elsewhere = longer.keys() & {section.setting.doubled for section in found}
    kept = [
        _with_longer(section, longer.get(section.setting.doubled))
        for section in found
        if section.setting not in told_elsewhere
    ]
    families = list(FAMILIES)
    return sorted(kept, key=lambda one: (families.index(one.setting.family), -one.setting.images_seen))


def _with_longer(section: Section, longer: Section | None) -> Section:
    if longer is None:
        return section
    return replace(section, twice=longer.alone, records=[*section.records, *longer.records])


def _section(setting: Setting, group: list[Record]) -> Section:
    runs = [record for record in group if record['kind'] == 'run']
    ratios: dict[str, float] = {}
    for record in group:
        if record['kind'] == 'cost':
            ratios.update(record['ratios'])
    tables: dict[str, list[Line]] = {}
    for augmentation in AUGMENTATIONS:
        for variant in FAMILIES[setting.family]:
            own = [run for run in runs if (run['variant'], run['augmentation']) == (variant.name, augmentation)]
            if own:
                accuracies = {run['seed']: run['accuracy'] for run in sorted(own, key=lambda run: run['seed'])}
                losses = [run.get('train_loss') for run in own]
                loss = None if None in losses else statistics.fmean(losses)
                line = Line(variant.name, variant.title, own[0]['parameters'], accuracies, loss)
                tables.setdefault(augmentation, []).append(line)
    return Section(setting, tables, ratios, runs)


def markdown(found: list[Section]) -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for section in found:
        parts.append(f'## {section.title}\n\n{_conditions(section)}\n')
        for augmentation, lines in section.tables.items():
            parts.append(f'### {section.title}, augmentation: {augmentation}\n')
            parts.append('\n'.join(_table(section, lines)) + '\n')
            parts.append(reading(section.setting.original.name, lines) + '\n')
            own = [run for run in section.records if run['augmentation'] == augmentation]
            if section.setting.has_bottlenecks and len(lines) > 1:
                parts.append(order(lines) + '\n')
            if augmentation in section.twice:
                parts += longer_trained(lines, section.twice[augmentation])
            parts += gates({line.name: line.title for line in lines}, own)
    parts.append(_REMARKS)
    return '\n'.join(parts)


def _conditions(section: Section) -> str:
    """What was done, on what, and how long it took."""
    setting, runs = section.setting, section.records
    recipe = f', {_SCHEDULES[setting.schedule]}, '.join(_RECIPES[setting.family])
    steps = setting.train_images // setting.batch_size * setting.epochs
    precision = 'float32' if setting.precision == 'float32' else "bfloat16 by torch's autocast"
    machines = {
        f'{run["machine"]["processor"]}, {run["machine"]["threads"]} thread(s), torch {run["machine"]["torch"]}, '
        f'timm {run["machine"]["timm"]}, sem_timm {run["sem_timm"]}, Python {run["python"]}, {run["date"]}'
        for run in runs
    }
    commands = '\n'.join(f'    {command}' for command in sorted({run['command'] for run in runs}))
    seconds, cpu = (sum(run[name] for run in runs) for name in ('seconds', 'cpu_seconds'))
    stem = (
        ' The first convolution has a stride of 2: maps of 14 x 14, 7 x 7 and 4 x 4 pixels.'
        if setting.stem_stride == 2
        else ''
    )
    return (
        f'The first {setting.train_images:,} training images, {setting.epochs} epochs in batches of '
        f'{setting.batch_size}, {steps:,} steps; {recipe}; {precision}.{stem}\n\n{commands}\n\n'
        f'`--only`, `--augmentation` and `--seeds` choose which of its runs. {len(runs)} runs took '
        f'{seconds / 3600:.2f} hours in all, and {cpu / 3600:.2f} hours of processor time, on a machine that other '
        f'work may have shared. {"; ".join(sorted(machines))}.'
    )


def _table(section: Section, lines: list[Line]) -> list[str]:
    """The lines of a table."""
    original = section.setting.original.name
    base = next((line for line in lines if line.name == original), None)
    rows = []
    for line in lines:
        difference = None if base is None or line is base else line.against(base)
        ratio = section.ratios.get(line.name)
        rows.append([
            line.title,
            f'{line.parameters:,}',
            '' if ratio is None else f'{ratio:.2f}',
            '' if line.train_loss is None else f'{line.train_loss:.3f}',
            f'{line.mean:.2f}' + ('' if line.spread is None else f' ± {line.spread:.2f}'),
            '' if difference is None else f'{difference:+.2f}',
            ', '.join(f'{accuracy:.2f}' for accuracy in line.accuracies.values()),
        ])  # fmt: skip
    header = [
        'variant',
        'parameters',
        'time of a step',
        'training loss',
        'accuracy, %',
        f'against {original}',
        'each seed',
    ]
    return piped(header, rows)


_REMARKS = """\
## How far to trust this

- A standard deviation of few seeds is itself uncertain, hence the pooling. About one in twenty comparisons passes the
  threshold of two standard errors by chance, and each table has several.
- The seeds share the test images and the training images; other images could order the variants otherwise.
- The recipe was not tuned for each variant, and may suit some better than others. The learning rate of
  ResNets is the one published for SEM, that of the transformer our own choice. Two defaults for short trainings were
  chosen by single runs of plain, SEM and self-attention, measured on training images that are not among the first
  10,240: the batch size of 64, where 128 is published, and no augmentation for the transformer, which with it had
  learned little.
- A short training on few images, 4 epochs on 10,240, shows how variants *start* to learn. The published initial values
  of the gates make each residual branch smaller (three operators to about 0.09 of it on average), from which a network
  has to recover first. The published gains are for 164 epochs on CIFAR in networks of 83 and 164 layers. Others print
  for ResNet-20 on CIFAR-10 91.7 without a gate, 91.6 with SE and 91.9 with ECA, for ResNet-56 91.5, 92.4 and 92.4, one
  run each ([channel-attention](https://github.com/mnikitin/channel-attention)).
- Time of a step is that of one training step against the original's, the variants taking turns in one process, as the
  median of several rounds. In small networks on one thread it is mostly the overhead of many small calls, and says
  little about large ones.
"""
