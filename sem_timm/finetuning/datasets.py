"""From the name of some data to its training and validation samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from sem_timm.errors import OptionError
from sem_timm.finetuning.errors import DataError
from sem_timm.finetuning.opening import folders_in, open_split, root_of
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.samples import LabelCheck, Samples


@dataclass(frozen=True)
class Data:
    """What is trained and measured on.

    Attributes:
        name: What was asked for.
        train: Training samples; or timm's iterable dataset where samples come as a stream.
        validation: Samples that accuracy is measured on, likewise.
        num_classes: Number of classes.
        held_out: Whether the validation samples were held out of the training split.
        classes: Names of the classes in the order of their numbers, where the data tells.
    """

    name: str
    train: Any
    validation: Any
    num_classes: int
    held_out: bool = False
    classes: tuple[str, ...] = ()

    def bad_images(self) -> list[str]:
        """Names of the images that could not be read and were skipped."""
        parts = [part for part in (self.train, self.validation) if isinstance(part, Samples)]
        return [part.name(position) for part in parts for position in part.bad.nonzero().flatten().tolist()]


def length_of(dataset: Any) -> int:
    """How many images a dataset has."""
    # The length of a stream is rounded, to what all of its workers can yield.
    told = getattr(getattr(dataset, 'reader', None), 'num_samples', None)
    return told if isinstance(told, int) else len(dataset)


def open_data(options: FinetuneOptions, part_size: int = 1) -> Data:
    """Opens the data of a run.

    Args:
        options: Those of the run.
        part_size: Images that a process computes at a time, which streams want to know.

    Raises:
        DataError: If there is no such data, its classes do not fit, or there are too few images.
        OptionError: If the number of classes must be told and was not.
        MissingPackageError: If the data needs a package that is not installed.
    """
    if options.is_built_in:
        from sem_timm.finetuning.builtin import open_built_in

        return _samples(options, open_built_in(options, True), open_built_in(options, False), False)
    train = open_split(options, options.train_split, part_size)
    validation = open_split(options, options.validation_split, part_size)
    if isinstance(train, IterableDataset):
        num_classes = _num_classes(options, train)
        _check_stream(options)
        streams: tuple[Any, Any] = train, validation
        for part in streams:
            part.target_transform = LabelCheck(options.data, num_classes)
        return Data(options.data, train, validation, num_classes)
    held_out = _is_held_out(options, train, validation)
    return _samples(options, train, train if held_out else validation, held_out)


def _is_held_out(options: FinetuneOptions, train: Any, validation: Any) -> bool:
    """Whether there are no images for validation but those for training.

    Raises:
        DataError: If images of the one are among those of the other.
    """
    roots = root_of(train), root_of(validation)
    if roots[0] is None or roots[1] is None:
        return False
    if roots[1] in roots[0].parents:  # timm takes the whole folder for a split that has none
        return True
    if roots[0] in roots[1].parents:
        raise DataError(
            f'{options.data} has a folder for validation, {roots[1].name}, and none for training, so that its images '
            f'would be trained on as well. Name the other folder with --train-split; there is {folders_in(roots[0])}.'
        )
    return roots[0] == roots[1]


def _samples(options: FinetuneOptions, train: Any, validation: Any, held_out: bool) -> Data:
    """Samples of two datasets, or of two parts of one."""
    if not held_out:
        _check_classes(train, validation)
    parts = _chosen(options, len(train), None if held_out else len(validation))
    if options.tuning_fraction:
        validation = train
    num_classes = _num_classes(options, train)
    check = LabelCheck(options.data, num_classes)
    samples = [
        Samples(dataset, options.seed, check, indices, options.skip_bad_images, measured)
        for dataset, indices, measured in zip((train, validation), parts, (False, True))
    ]
    if not len(samples[0]):
        raise DataError(
            f'{options.data} has no images left for training; try a smaller --validation-fraction or --tuning-fraction.'
        )
    if len(samples[0]) < options.batch_size:
        fitting = max(1, len(samples[0]) // 8 // options.accumulate) * options.accumulate
        raise DataError(
            f'{options.data} has {len(samples[0])} images for training, fewer than one update takes: '
            f'--batch-size {options.batch_size}. Give a smaller one, such as {fitting}.'
        )
    if not len(samples[1]):
        way = '--tuning-fraction' if options.tuning_fraction else '--validation-fraction'
        raise DataError(f'{options.data} has no images for validation; try a larger {way}.')
    classes = tuple(_class_names(train) or ())
    if len(classes) == 1 and options.num_classes is None:
        raise DataError(
            f'{options.data} has a single class, {classes[0]!r}; put the images of each class into a folder of it.'
        )
    return Data(options.data, samples[0], samples[1], num_classes, held_out, classes)


def _chosen(
    options: FinetuneOptions, num_train: int, num_validation: int | None
) -> tuple[Sequence[int], Sequence[int]]:
    """The samples that are trained on and those that are measured on, by number.

    Those for validation are held out first, then so many are drawn from the rest as are to be trained on, and of these
    some are held out for tuning. So the validation images are the same with and without tuning.

    Args:
        options: Those of the run.
        num_train: Number of samples that may be trained on.
        num_validation: Number of those for validation; None if they are to be held out of the others.
    """
    seed = options.seed if options.split_seed is None else options.split_seed
    train: Sequence[int] = range(num_train)
    validation: Sequence[int] = range(num_validation or 0)
    if num_validation is None:
        train, validation = _parted(train, round(num_train * options.validation_fraction), seed)
    if options.max_validation_images is not None and options.max_validation_images < len(validation):
        validation = _parted(validation, options.max_validation_images, seed)[1]
    if options.max_train_images is not None and options.max_train_images < len(train):
        train = _parted(train, options.max_train_images, options.seed)[1]
    if options.tuning_fraction:
        # With another seed than above, which would take those that would have been held out next.
        train, validation = _parted(train, round(len(train) * options.tuning_fraction), seed + 1)
    return train, validation


def _parted(indices: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Parts samples at random: all but so many, and those; both in order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(indices[i] for i in order[count:]), sorted(indices[i] for i in order[:count])


def _check_stream(options: FinetuneOptions) -> None:
    given = [
        name for name in ('max_train_images', 'max_validation_images', 'tuning_fraction') if getattr(options, name)
    ]
    if given:
        raise OptionError(
            f'{options.data} is a stream, of which no part can be chosen: leave out {", ".join(given)}, or give a '
            'folder of images.'
        )


def _class_names(dataset: Any) -> list[str] | None:
    holder = getattr(dataset, 'reader', dataset)
    found = (getattr(holder, name, None) for name in ('class_to_idx', 'class_name_to_idx', 'classes'))
    names = next(filter(None, found), None)
    return None if names is None else [str(name) for name in names]


def _check_classes(train: Any, validation: Any) -> None:
    known, measured = _class_names(train), _class_names(validation)
    if known is not None and measured is not None and known != measured:
        differing = sorted(set(known) ^ set(measured)) or known
        raise DataError(
            f'training has {len(known)} classes and validation {len(measured)}; they must be the same. '
            f'In one only: {", ".join(differing[:5])}.'
        )


def _num_classes(options: FinetuneOptions, dataset: Any) -> int:
    names = _class_names(dataset)
    if options.num_classes is None and names is None:
        raise OptionError(f'{options.data} does not tell its number of classes; give --num-classes.')
    if names is not None and options.num_classes is not None and options.num_classes < len(names):
        raise OptionError(f'num_classes={options.num_classes}, but {options.data} has {len(names)} classes.')
    return options.num_classes or len(names or ())
