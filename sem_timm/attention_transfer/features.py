"""Final features matched: the last tokens of the swapped model's own forward become those of the original.

Layers that are matched one by one learn on the original's inputs, which they never see in the swapped model: errors of
the first change what the later are given. Here the whole chain is trained on what it gives at its end, the tokens or
maps after the last norm, without a label and without a head (arXiv 2605.02772 and others measured that it decides).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sem_timm.attention_transfer.batches import drawn, number_of_steps
from sem_timm.attention_transfer.matching import Progress, check_losses, narrow, training_parts
from sem_timm.attention_transfer.options import TransferOptions
from sem_timm.attention_transfer.pair import Pair
from sem_timm.attention_transfer.processes import average_gradients, total
from sem_timm.batches import Loader
from sem_timm.errors import ModelError

# What the learning rate ends at, as a part of its peak.
FINAL_RATE = 0.2


def check_features(model: nn.Module) -> None:
    """Raises ModelError if a model does not tell its final features."""
    if not callable(getattr(model, 'forward_features', None)):
        raise ModelError(
            f'{type(model).__name__} has no forward_features, which gives the features that this stage matches. '
            "stages=('initialize', 'match') does without."
        )


def match_features(
    pair: Pair, loader: Loader, options: TransferOptions, progress: Progress | None = None
) -> tuple[list[float], int]:
    """Trains the student to give the original's final features; first its swapped modules, then all of it.

    The loss is the mean squared error as a part of the variance of the original's features over batch and positions,
    as a mean over kinds of tokens: class and other prefix tokens, and those of the image.

    Returns:
        The loss of each step, and the number of images drawn.

    Raises:
        ModelError: If the model has no ``forward_features``, or the loss is no number any more.
    """
    check_features(pair.model)
    student: Any = pair.student
    teacher: Any = pair.teacher
    prefix = getattr(pair.model, 'num_prefix_tokens', 0)
    steps = number_of_steps(loader, options.features_epochs, options.features_steps)
    alone = round(options.features_alone * steps)
    parts = (
        {0: ('module', alone), alone: ('all', steps - alone)} if 0 < alone < steps else {0: (_which(options), steps)}
    )
    losses: list[float] = []
    images_seen = 0
    for step, (images, _) in enumerate(drawn(loader, steps, pair.model)):
        if step in parts:  # each begins with a warm-up, as weights that join have no history
            which, count = parts[step]
            begun = step
            group = [(pair.parameters(which), options.features_learning_rate)]
            optimizer, scheduler = training_parts(group, options, count, FINAL_RATE)
        with torch.no_grad(), narrow(options, images):
            wanted = teacher.forward_features(images)
        with torch.enable_grad():
            with narrow(options, images):
                given = student.forward_features(images)
            loss = _missed_part(given, wanted, prefix)
            loss.backward()
        check_losses([] if loss.isfinite() else ['the features'], step, 'features')
        average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(step + 1 - begun)
        losses.append(float(loss.detach()))
        images_seen += len(images)
        if progress is not None:
            progress('features', step + 1, steps, losses[-1])
    return losses, images_seen


def _which(options: TransferOptions) -> str:
    return 'all' if options.features_alone == 0 else 'module'


def _missed_part(given: Tensor, wanted: Tensor, prefix: int) -> Tensor:
    """The missed part of the variance of features (B, N, C), or (B, ...) without tokens, as a mean over kinds."""
    given, wanted = given.float(), wanted.float()
    kinds = [(given, wanted)]
    if wanted.dim() == 3 and 0 < prefix < wanted.shape[1]:
        kinds = [(x[:, some], y[:, some]) for x, y in kinds for some in (slice(0, prefix), slice(prefix, None))]
    parts = [(x - y).square().mean() / _variance(y).clamp(min=1e-12) for x, y in kinds]
    return torch.stack(parts).mean()


def _variance(features: Tensor) -> Tensor:
    """The mean variance of channels, which are the last axis of tokens and the second of maps, in all processes."""
    rows = features.flatten(0, -2) if features.dim() == 3 else features.transpose(1, -1).flatten(0, -2)
    count = total(rows.new_tensor(len(rows)))
    mean = total(rows.sum(0)) / count
    return (total((rows - mean).square().sum(0)) / count).mean()
