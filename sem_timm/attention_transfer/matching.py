"""Training each swapped module to give its original's outputs on the original's inputs, all of them at once.

The original runs once on each batch. Where it computes a swapped module, the new one computes the same inputs, and its
gradient is taken at once, so that one layer's activations are in memory at a time and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import drawn, number_of_steps
from sem_timm.attention_transfer.measure import visiting
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair, SwappedLayer
from sem_timm.batches import Loader
from sem_timm.errors import OptionError, closest
from sem_timm.surgery.evaluate import first_tensor

# Called after each step with the stage, the step, the number of steps and the loss.
Progress = Callable[[str, int, int, float], None]


def training_parts(
    parameters: list[nn.Parameter], options: TransferOptions, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Timm's optimizer and schedule over a number of steps.

    Raises:
        OptionError: If timm does not know the optimizer or the schedule.
    """
    try:
        optimizer = create_optimizer_v2(
            parameters, options.optimizer, lr=learning_rate, weight_decay=options.weight_decay
        )
    except (ValueError, AssertionError) as error:
        names = [str(name) for name in list_optimizers()]
        raise OptionError(f'optimizer={options.optimizer!r} is unknown. {closest(options.optimizer, names)}') from error
    try:
        scheduler, _ = create_scheduler_v2(  # an epoch of the schedule is a step
            optimizer,
            options.scheduler,
            num_epochs=steps,
            warmup_epochs=int(options.warmup * steps),
            warmup_lr=learning_rate / 100,
            min_lr=learning_rate / 100,
        )
    except (ValueError, AssertionError) as error:
        known = ('cosine', 'tanh', 'step', 'multistep', 'poly')
        raise OptionError(
            f'scheduler={options.scheduler!r} is no schedule over {steps} steps. {closest(options.scheduler, known)}'
        ) from error
    if scheduler is None:
        raise OptionError("scheduler='none' leaves no schedule; for a constant rate give 'step'.")
    return optimizer, scheduler


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
    parameters = pair.parameters(options.train)
    optimizer, scheduler = training_parts(parameters, options, options.learning_rate, steps)
    losses: list[float] = []
    images_seen = 0
    collected: list[Tensor] = []

    def learn(layer: SwappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor) -> None:
        with torch.enable_grad():
            given = first_tensor(layer.student(*args, **kwargs))
            loss = _missed_part(layer, given, wanted, variances[layer.name])
            loss.backward()
        collected.append(loss.detach())

    with visiting(pair, learn) as teacher:
        for step, (images, _) in enumerate(drawn(loader, steps, pair.model)):
            with torch.no_grad():
                teacher(images)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(step + 1)
            losses.append(float(torch.stack(collected).mean()))
            collected.clear()
            images_seen += len(images)
            if progress is not None:
                progress('match', step + 1, steps, losses[-1])
    return losses, images_seen


def _missed_part(layer: SwappedLayer, given: Tensor, wanted: Tensor, variances: list[float]) -> Tensor:
    """The mean squared error as a part of the variance, as a mean over kinds of tokens.

    The class token, one among many, is what most heads read, so that it counts as much as all others together.
    """
    kinds = zip(layer.token_groups(given), layer.token_groups(wanted), variances)
    parts = [(one - other).square().mean() / max(variance, 1e-30) for one, other, variance in kinds]
    return torch.stack(parts).mean()
