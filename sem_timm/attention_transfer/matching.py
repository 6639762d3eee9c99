"""Training each swapped module to give its original's outputs on the original's inputs, all of them at once.

The original runs once on each batch. Where it computes a swapped module, the new one computes the same inputs, and its
gradient is taken at once, so that one layer's activations are in memory at a time and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import drawn, number_of_steps
from sem_timm.attention_transfer.measure import visiting
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.attention_transfer.processes import average_gradients, is_so_anywhere
from sem_timm.batches import Loader
from sem_timm.compat import create_scheduler, list_optimizers
from sem_timm.errors import ModelError, OptionError, closest
from sem_timm.surgery import tensors_in

SCHEDULES = ('cosine', 'constant', 'multistep', 'poly', 'rsqrt', 'step', 'tanh', 'wsd')

# Called after each step with the stage, the step, the number of steps and the loss.
Progress = Callable[[str, int, int, float], None]


def training_parts(
    parameters: list[tuple[list[nn.Parameter], float]], options: TransferOptions, steps: int, final: float = 0.01
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Timm's optimizer and schedule over a number of steps.

    Args:
        parameters: Groups of parameters, each with the peak of its learning rate.
        options: Optimizer, schedule and warm-up.
        steps: Number of steps.
        final: The learning rate at the end, as a part of the highest peak.

    Raises:
        OptionError: If timm does not know the optimizer or the schedule, or cannot make it here.
    """
    groups = [(group, rate) for group, rate in parameters if group]
    peak = max(rate for _, rate in groups)
    optimizer = _optimizer(groups, options, peak)
    return optimizer, _scheduler(optimizer, options.scheduler, peak, steps, int(options.warmup * steps), final)


def _optimizer(
    groups: list[tuple[list[nn.Parameter], float]], options: TransferOptions, peak: float
) -> torch.optim.Optimizer:
    name = str(options.optimizer)
    known = list_optimizers()
    if name.lower().split('_')[-1] not in known:  # as timm reads it, to which 'lookahead_adamw' is adamw
        raise OptionError(f'optimizer={options.optimizer!r} is unknown. {closest(name, known)}')
    parameters = [{'params': group, 'lr': rate} for group, rate in groups]
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            parameters, name, lr=peak, weight_decay=options.weight_decay
        )
    except (ValueError, AssertionError) as error:
        raise OptionError(f'optimizer={name!r}: {error}') from error
    return optimizer


def _scheduler(
    optimizer: torch.optim.Optimizer, name: str, learning_rate: float, steps: int, warmup: int, final: float
) -> Scheduler:
    try:
        scheduler: Scheduler | None = create_scheduler(  # an epoch of the schedule is a step
            optimizer,
            name,
            num_epochs=steps,
            decay_epochs=steps / 3 if name == 'step' else None,  # None is a part of the steps for others
            decay_milestones=[steps // 2 + 1, steps * 3 // 4 + 1],  # which timm reads as the step before
            warmup_epochs=warmup,
            warmup_lr=learning_rate * 0.01,
            min_lr=learning_rate * final,
        )
    except (ValueError, AssertionError) as error:
        if name in SCHEDULES:
            raise OptionError(f'scheduler={name!r} over {steps} steps: {error}') from error
        raise OptionError(f'scheduler={name!r} is unknown. {closest(str(name), SCHEDULES)}') from error
    if scheduler is None:
        raise OptionError("scheduler='none' leaves no schedule; for a constant rate give 'constant'.")
    return scheduler


def match(
    pair: Pair,
    loader: Loader,
    options: TransferOptions,
    variances: dict[str, list[float]],
    progress: Progress | None = None,
) -> tuple[list[float], int]:
    """Trains the student's swapped layers on the original's inputs and outputs.

    The loss of a layer is divided by ``variances``, one for each kind of tokens.

    Returns:
        The loss of each step, as a mean over the layers, and the number of images drawn.
    """
    steps = number_of_steps(loader, options.epochs, options.steps)
    rates = options.learning_rate, options.base_learning_rate
    optimizer, scheduler = training_parts(pair.groups(options.train, *rates), options, steps)
    losses: list[float] = []
    images_seen = 0
    collected: list[Tensor] = []
    failed: list[str] = []

    def learn(layer: SwappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor) -> None:
        with torch.enable_grad(), narrow(options, wanted):
            given = tensors_in(layer.student(*args, **kwargs))[0]
            loss = missed_part(layer, given, wanted, variances[layer.name])
            loss.backward()
        collected.append(loss.detach())
        if not loss.isfinite():
            failed.append(layer.name)

    with visiting(pair, learn) as teacher:
        for step, (images, _) in enumerate(drawn(loader, steps, pair.model)):
            with torch.no_grad():
                teacher(images)
            check_losses(failed, step, 'match')
            average_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(step + 1)
            losses.append(float(torch.stack(collected).mean()))
            collected.clear()
            images_seen += len(images)
            if progress is not None:
                progress('match', step + 1, steps, losses[-1])
    return losses, images_seen


def narrow(options: TransferOptions, images: Tensor) -> AbstractContextManager[Any]:
    """Autocast on the device of some images, where it is asked for."""
    if options.amp_dtype is None:
        return nullcontext()
    return torch.autocast(images.device.type, getattr(torch, options.amp_dtype))


def check_losses(failed: list[str], step: int, stage: str) -> None:
    """Raises ModelError if something became infinite or not a number; ``failed`` tells what."""
    if is_so_anywhere(bool(failed)):
        what = failed[0] if failed else 'a layer in another process'
        raise ModelError(
            f'stage {stage!r} lost its way in step {step + 1}: the error of {what} became infinite or not a '
            'number. The model is as it was before this stage. Use a smaller learning_rate, and look at the images.'
        )


def missed_part(layer: SwappedLayer, given: Tensor, wanted: Tensor, variances: list[float]) -> Tensor:
    """The mean squared error as a part of the variance, as a mean over kinds of tokens.

    The class token, one among many, is what most heads read, so that it counts as much as all others together.
    """
    kinds = zip(layer.token_groups(given), layer.token_groups(wanted), variances)
    parts = [(one.float() - other.float()).square().mean() / max(variance, 1e-30) for one, other, variance in kinds]
    return torch.stack(parts).mean()
