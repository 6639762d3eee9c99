"""Attention transfer: a swapped model learns from its original what the original's attention did."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import calibration_batches, first_batches
from sem_timm.attention_transfer.checkpoint import Checkpoint
from sem_timm.attention_transfer.distillation import check_aim, distill
from sem_timm.attention_transfer.evaluation import Evaluation
from sem_timm.attention_transfer.features import check_features, match_features
from sem_timm.attention_transfer.matching import Progress, match, narrow
from sem_timm.attention_transfer.measure import error_of, spreads
from sem_timm.attention_transfer.memories import check_memories, initialize
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, make_pair, swaps_of
from sem_timm.attention_transfer.processes import number_of_processes, take_from_main, total
from sem_timm.attention_transfer.result import Stage, TransferResult
from sem_timm.attention_transfer.undisturbed import undisturbed
from sem_timm.attention_transfer.value_maps import fit_values
from sem_timm.batches import Loader
from sem_timm.errors import ModelError, OptionError, RefusedError, closest

# Errors of layers are measured on so many batches at most, before the first stage and after each.
MEASURED_BATCHES = 4


def transfer(
    model: nn.Module,
    loader: Loader,
    options: TransferOptions | None = None,
    *,
    evaluation: Loader | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    **fields: Any,
) -> TransferResult:
    """Gives a model whose attention was swapped the skill of its original back, as far as that goes.

    The old weights are still in a swapped model, so that it is its own teacher: 'initialize' fills the memories of
    external attention, and the maps of values of what was swapped with ``own=True`` or ``local=True``, in closed form;
    'match' trains each new layer to give its original's outputs on the original's inputs; 'features' trains the whole
    chain to give the original's final features; and 'distill' trains on the original's logits, or on labels, with what
    the layers gave kept beside them. Dropout is off and running statistics stand still. With the default
    ``train='new'`` the base's weights stay as they are, so that `unpatch_model` gives exactly the original; other
    choices train some of them too.

    Args:
        model: A model after ``patch_model(model, 'external')`` or with another attention; trained in place.
        loader: Images that the model is for: batches (B, C, H, W), pairs of these and labels, or dictionaries. Labels
            are used by ``distill_with='labels'`` alone.
        options: How; or give the fields of `TransferOptions` by name.
        evaluation: Images with labels, whole numbers (B,), to measure accuracy on, and errors on the first of them;
            passed over again for each stage. Without labels, errors alone are measured.
        progress: Called after each step with the stage, the step, the number of steps and the loss.
        checkpoint: A file that is written after each stage. Where it is there already, the transfer goes on behind the
            stages that it has, on the same swapped model and with the same options.
        **fields: Fields of `TransferOptions`, in place of ``options``.

    Returns:
        Errors of layers and accuracies: original, swapped, after each stage; printing it shows a table.

    Raises:
        SemTimmError: ModelError if nothing is swapped or the old weights are gone, RefusedError for a stage that this
            attention cannot take, OptionError for options and loaders. The model is then unchanged. ModelError if a
            training becomes infinite or not a number; the model then has what the stages before that one gave.
    """
    options = _options(options, fields)
    swaps_of(model)  # its errors come before those of the loader
    with undisturbed(options.seed):
        share = -(-options.calibration_images // number_of_processes())
        first = calibration_batches(loader, share, model)
        pair = make_pair(model, first[0][0], _trained(options).values())
        take_from_main(pair.student.get_parameter(name) for name in pair.trained)
        run = _Run(pair, options, first, evaluation)
        file = None if checkpoint is None else Checkpoint(Path(checkpoint), pair, options)
        learned = run.begin(file)
        for stage in run.stages:
            if stage in (done.name for done in run.done):
                continue
            try:
                torch.manual_seed(options.seed)  # so that one that goes on draws what it would have drawn
                run.do(stage, loader, progress)
                learned = pair.learned(stage)
                if file is not None:
                    file.save(run.done, learned)
            except ModelError:
                pair.write(learned)
                raise
        pair.write(learned)
    return run.result()


def initialize_memories(
    model: nn.Module, batches: Loader, options: TransferOptions | None = None, **fields: Any
) -> TransferResult:
    """The stage 'initialize' of `transfer` alone, on all of some batches.

    Args:
        model: As for `transfer`, with 'external' or another attention that has memories.
        batches: As ``loader`` of `transfer`; all of it is held in memory.
        options: As for `transfer`; of it ``keys``, ``values``, ``sharpness``, ``iterations`` and ``seed`` count.
        **fields: Fields of `TransferOptions`, in place of ``options``.

    Returns:
        Errors of layers: original, swapped, after the stage.

    Raises:
        SemTimmError: As `transfer`. The model is then unchanged.
    """
    options = replace(_options(options, fields), stages=('initialize',))
    swaps_of(model)
    with undisturbed(options.seed):
        images = _images(first_batches(batches, None, model))
    return transfer(model, images, replace(options, calibration_images=sum(map(len, images))))


def match_layers(
    model: nn.Module,
    loader: Loader,
    options: TransferOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> TransferResult:
    """The stage 'match' of `transfer` alone, from the parameters as they are.

    Args:
        model: As for `transfer`.
        loader: As for `transfer`.
        options: As for `transfer`.
        progress: As for `transfer`.
        **fields: Fields of `TransferOptions`, in place of ``options``.

    Returns:
        Errors of layers: original, swapped, after the stage.

    Raises:
        SemTimmError: As `transfer`. The model is then unchanged.
    """
    return transfer(model, loader, replace(_options(options, fields), stages=('match',)), progress=progress)


def _options(options: TransferOptions | None, given: dict[str, Any]) -> TransferOptions:
    known = [field.name for field in fields(TransferOptions)]
    for name in given:
        if name not in known:
            raise OptionError(f'option {name!r} of transfer is unknown. {closest(name, known)}')
    return replace(options or TransferOptions(), **given)


def _trained(options: TransferOptions) -> dict[str, str]:
    """What each stage changes, in words of `TRAINED`."""
    each = {'initialize': 'new', 'match': options.train, 'distill': options.distill_train or options.train}
    each['features'] = 'module' if options.features_alone == 1 else 'all'  # whatever part that is
    return {stage: each[stage] for stage in options.stages or ('initialize', 'match')}


def _images(batches: list[tuple[Tensor, Any]]) -> list[Tensor]:
    return [images for images, _ in batches]


class _Run:
    """The stages of one transfer, measured one after another."""

    def __init__(
        self, pair: Pair, options: TransferOptions, first: list[tuple[Tensor, Any]], evaluation: Loader | None
    ) -> None:
        self.pair, self.options, self.calibration = pair, options, _images(first)
        self.stages = options.stages or _possible(pair)
        if 'initialize' in self.stages:
            check_memories(pair)
        if 'features' in self.stages:
            check_features(pair.model)
        if 'distill' in self.stages:
            check_aim(pair, options, first)
        for stage, which in _trained(options).items():
            if stage != 'initialize':
                pair.names(which)
        self.measured, self.evaluation = self.calibration[:MEASURED_BATCHES], None
        if evaluation is not None:
            shown = first_batches(evaluation, MEASURED_BATCHES, pair.model)
            self.measured, self.evaluation = _images(shown), Evaluation(evaluation, shown)
        self.done: list[Stage] = []

    def begin(self, file: Checkpoint | None) -> dict[str, Tensor]:
        """Measures the model as it is, or goes on from a file; returns what is learned so far."""
        stages, learned = file.restore() if file is not None else ([], {})
        if stages:
            self.done, self.variances = stages, self._spreads()[1]
        else:
            self.done = [Stage('original', accuracy=self._accuracy(self.pair.teacher))]
            self._measure(Stage('swap'))
        return learned

    def do(self, name: str, loader: Loader, progress: Progress | None) -> None:
        """Runs one stage, and measures what came of it."""
        start = time.perf_counter()
        losses: list[float] = []
        sharpness: dict[str, list[float]] = {}
        if name == 'initialize':
            sharpness = initialize(self.pair, self.calibration, self.options)
            fit_values(self.pair, self.calibration, self.options)
            seen = sum(map(len, self.calibration))
        elif name == 'match':
            losses, seen = match(self.pair, loader, self.options, self.variances, progress)
        elif name == 'features':
            losses, seen = match_features(self.pair, loader, self.options, progress)
        else:
            losses, seen = distill(self.pair, loader, self.options, self.variances, progress)
        seen = int(total(torch.tensor(seen)))
        losses = (total(torch.tensor(losses)) / number_of_processes()).tolist()
        seconds = time.perf_counter() - start
        stage = Stage(name, images_seen=seen, seconds=seconds, losses=tuple(losses), sharpness=sharpness)
        self._measure(stage)

    def result(self) -> TransferResult:
        """All that was measured."""
        model, options = self.pair.model, self.options
        operation = ', '.join(dict.fromkeys(str(layer.edit.operation) for layer in self.pair.layers))
        count = sum(model.get_parameter(name).numel() for name in self.pair.trained)
        return TransferResult(type(model).__name__, operation, options, tuple(self.done), count)

    def _measure(self, stage: Stage) -> None:
        errors, self.variances = self._spreads()
        self.done.append(replace(stage, errors=errors, accuracy=self._accuracy(self.pair.student)))

    def _spreads(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The error of each layer, and the variances of its original's outputs by kinds of tokens."""
        with narrow(self.options, self.measured[0]):
            found = spreads(self.pair, self.measured)
        variances = {name: [kind.variance for kind in kinds] for name, kinds in found.items()}
        return {name: error_of(kinds) for name, kinds in found.items()}, variances

    def _accuracy(self, model: nn.Module) -> float | None:
        if self.evaluation is None:
            return None
        with narrow(self.options, self.measured[0]):
            return self.evaluation.accuracy(model)


def _possible(pair: Pair) -> tuple[str, ...]:
    """The first two stages, or the second alone where there are no memories to initialise."""
    try:
        check_memories(pair)
    except RefusedError:
        return ('match',)
    return ('initialize', 'match')
