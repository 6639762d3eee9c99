"""End-to-end distillation of a swapped model from its original, by timm's own task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sem_timm.attention_transfer.batches import drawn, number_of_steps
from sem_timm.attention_transfer.matching import Progress, check_losses, narrow, training_parts
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair
from sem_timm.batches import Loader
from sem_timm.compat import logit_distillation_task
from sem_timm.errors import ModelError


def distill(
    pair: Pair, loader: Loader, options: TransferOptions, progress: Progress | None = None
) -> tuple[list[float], int]:
    """Trains the student to name classes with the original's probabilities, by `timm.task.LogitDistillationTask`.

    Labels are not used: the loss is the divergence of the two alone.

    Returns:
        The loss of each step, and the number of images drawn.

    Raises:
        ModelError: If the model is no classifier of timm.
    """
    steps = number_of_steps(loader, options.distill_epochs, options.distill_steps)
    rates = options.distill_learning_rate, options.base_learning_rate
    groups = pair.groups(options.distill_train or options.train, *rates)
    optimizer, scheduler = training_parts(groups, options, steps)
    task = _task(pair, options.temperature)
    losses: list[float] = []
    images_seen = 0
    for step, (images, _) in enumerate(drawn(loader, steps, pair.model)):
        no_labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with torch.enable_grad():
            with narrow(options, images):
                loss = task(images, no_labels)['loss']
            loss.backward()
        check_losses([] if loss.isfinite() else ['the logits'], step, 'distill')
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(step + 1)
        losses.append(float(loss.detach()))
        images_seen += len(images)
        if progress is not None:
            progress('distill', step + 1, steps, losses[-1])
    return losses, images_seen


def _task(pair: Pair, temperature: float) -> Callable[..., Any]:
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
        criterion=torch.nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        task_loss_weight=0.0,
        temperature=temperature,
        device=weight.device,
        dtype=weight.dtype,
        verbose=False,
    )
    return task
