"""End-to-end training of a swapped model: on its original's logits, by timm's own task, or on labels.

What layers gave is kept beside it: the error of each, in the student's own forward, is a part of the loss. Alone, few
images lead a whole model to what it is asked for by ways that hold for these images only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import drawn, number_of_steps
from sem_timm.attention_transfer.evaluation import classes_of
from sem_timm.attention_transfer.matching import Progress, check_losses, missed_part, narrow, training_parts
from sem_timm.attention_transfer.measure import student_outputs, visiting
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.attention_transfer.processes import average_gradients
from sem_timm.batches import Loader
from sem_timm.compat import logit_distillation_task
from sem_timm.errors import ModelError, OptionError

# What a student is to name, from images and what came as their labels, as a loss.
Aim = Callable[[Tensor, Any], Tensor]


def distill(
    pair: Pair,
    loader: Loader,
    options: TransferOptions,
    variances: dict[str, list[float]],
    progress: Progress | None = None,
) -> tuple[list[float], int]:
    """Trains the student to name classes with the original's probabilities, or those of the labels.

    The loss is the divergence of the two by `timm.task.LogitDistillationTask`, which reads no labels, or the cross
    entropy of the labels; and ``distill_layer_weight`` times the mean error of the swapped layers. That is the mean
    squared difference of what a layer gives in the student's own forward to what its original gives in the original's,
    divided by ``variances``, one for each kind of tokens, which count as one half each.

    Returns:
        The loss of each step, and the number of images drawn.

    Raises:
        ModelError: If the model is no classifier of timm, or the loss is no number any more.
        OptionError: If labels are aimed at and there are none.
    """
    steps = number_of_steps(loader, options.distill_epochs, options.distill_steps)
    rates = options.distill_learning_rate, min(options.distill_learning_rate, options.base_learning_rate)
    groups = pair.groups(options.distill_train or options.train, *rates)
    optimizer, scheduler = training_parts(groups, options, steps)
    losses: list[float] = []
    images_seen = 0
    with student_outputs(pair) as given, _loss(pair, options, variances, given) as loss_of:
        for step, (images, labels) in enumerate(drawn(loader, steps, pair.model)):
            with torch.enable_grad():
                loss = loss_of(images, labels)
                loss.backward()
            check_losses([] if loss.isfinite() else [_first_lost(pair, given)], step, 'distill')
            average_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(step + 1)
            losses.append(float(loss.detach()))
            given.clear()
            images_seen += len(images)
            if progress is not None:
                progress('distill', step + 1, steps, losses[-1])
    return losses, images_seen


@contextmanager
def _loss(
    pair: Pair, options: TransferOptions, variances: dict[str, list[float]], given: dict[str, Tensor]
) -> Iterator[Aim]:
    """The loss of some images: what is aimed at, and the error of the layers, whose outputs the student leaves."""
    aim = _labels_named(pair) if options.distill_with == 'labels' else _probabilities(pair, options.temperature)
    if not options.distill_layer_weight:

        def alone(images: Tensor, labels: Any) -> Tensor:
            with narrow(options, images):
                return aim(images, labels)

        yield alone
        return
    wanted: dict[str, Tensor] = {}

    def keep(layer: SwappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        wanted[layer.name] = output

    with visiting(pair, keep) as teacher:

        def both(images: Tensor, labels: Any) -> Tensor:
            with narrow(options, images):
                loss = aim(images, labels)
                if not wanted:  # logits are aimed at by running the original, labels are not
                    with torch.no_grad():
                        teacher(images)
            errors = [missed_part(one, given[one.name], wanted[one.name], variances[one.name]) for one in pair.layers]
            wanted.clear()
            return loss + options.distill_layer_weight * torch.stack(errors).mean()

        yield both


def check_aim(pair: Pair, options: TransferOptions, batches: list[tuple[Tensor, Any]]) -> None:
    """Raises what `distill` would raise for lack of its task, or for labels that some batches lack."""
    if options.distill_with == 'logits':
        logit_distillation_task()
        return
    for images, labels in batches:
        _classes(images, labels)


def _first_lost(pair: Pair, given: dict[str, Tensor]) -> str:
    """The first layer whose output is no number; the logits, if all of them are."""
    lost = (layer.name for layer in pair.layers if not given[layer.name].isfinite().all())
    return next(lost, 'the logits')


def _labels_named(pair: Pair) -> Aim:
    criterion = nn.CrossEntropyLoss()
    if getattr(pair.student, 'num_classes', None) == 0:
        raise ModelError(
            f"distill_with='labels' needs a model that names classes; this {type(pair.student).__name__} gives "
            'features. Swap and transfer one with a head for these labels.'
        )

    def loss(images: Tensor, labels: Any) -> Tensor:
        classes = _classes(images, labels)
        logits = pair.student(images)
        if logits.dim() != 2 or int(classes.max()) >= logits.shape[1]:
            raise OptionError(
                f'labels go up to {int(classes.max())}, and the model gives {tuple(logits.shape)} for '
                f'{len(images)} images; it needs an output for each class. Swap and transfer a model with the head '
                "for these labels, or take distill_with='logits'."
            )
        value: Tensor = criterion(logits, classes)
        return value

    return loss


def _classes(images: Tensor, labels: Any) -> Tensor:
    if labels is None:
        raise OptionError(
            "distill_with='labels' got a loader of images alone; give pairs of images and labels, or take "
            "distill_with='logits', which needs none."
        )
    classes = classes_of(labels, images, 'the loader', " distill_with='logits' needs none.")
    if int(classes.min()) < 0:
        raise OptionError(
            f"the loader yields a label of {int(classes.min())}; distill_with='labels' needs classes counted from 0."
        )
    return classes


def _probabilities(pair: Pair, temperature: float) -> Aim:
    student: Any = pair.student
    missing = [name for name in ('pretrained_cfg', 'num_classes') if not getattr(student, name, None)]
    if missing:
        raise ModelError(
            f"timm's distillation task needs a classifier of timm; this {type(student).__name__} has no {missing[0]}. "
            "stages=('initialize', 'match') does without."
        )
    weight = next(student.parameters())
    task: Callable[..., Any] = logit_distillation_task()(
        student,
        pair.teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        task_loss_weight=0.0,
        temperature=temperature,
        device=weight.device,
        dtype=weight.dtype,
        verbose=False,
    )

    def loss(images: Tensor, _: Any) -> Tensor:
        no_labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        value: Tensor = task(images, no_labels)['loss']
        return value

    return loss
