"""One training on Fashion-MNIST: the recipe, the accuracy at its end, and what a step costs against the original's."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import sem_timm
from common.measuring import take_turns
from fashion.data import crop_and_flip
from fashion.models import FAMILIES, Variant, create, has_bottlenecks
from fashion.stopped import Kept
from sem_timm.finetuning.models import inserted_parameters

AUGMENTATIONS = ('crop-flip', 'none')

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    # As published for SEM, whose weight decay is on all parameters.
    'resnet': {'opt': 'momentum', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4, 'filter_bias_and_bn': False},
    'vit': {'opt': 'adamw', 'lr': 2e-3, 'weight_decay': 0.05},
}


@dataclass(frozen=True)
class Setting:
    """What all runs of one table share; runs of another setting are no repetition.

    Attributes:
        family: 'resnet' or 'vit'.
        depth: Layers of the ResNet, or blocks of the transformer.
        train_images: The first so many training images.
        epochs: Passes over them.
        batch_size: Images in a batch.
        precision: 'float32', or 'bfloat16' for torch's autocast.
        device: 'cpu' or 'cuda'.
        schedule: 'cosine', or 'drops' for a tenth of the learning rate after a half of the epochs, and again after
            three quarters, as published for SEM (after 81 and 122 of 164).
        bottlenecks: Whether a ResNet of fewer than 100 layers has bottlenecks, too.
        stem_stride: Stride of a ResNet's first convolution; with 2 a training takes a third of the time.
    """

    family: str
    depth: int
    train_images: int
    epochs: int
    batch_size: int = 64
    precision: str = 'bfloat16'
    device: str = 'cpu'
    schedule: str = 'cosine'
    bottlenecks: bool = False
    stem_stride: int = 1

    @property
    def key(self) -> dict[str, Any]:
        """What the log knows it by: fields that came later are left out where they are as before them."""
        later = ('schedule', 'bottlenecks', 'stem_stride')
        own = asdict(self).items()
        return {name: value for name, value in own if name not in later or value != getattr(type(self), name)}

    @property
    def has_bottlenecks(self) -> bool:
        """Whether the blocks are bottlenecks."""
        return self.family == 'resnet' and has_bottlenecks(self.depth, self.bottlenecks)

    @property
    def doubled(self) -> Setting:
        """The same with twice as many epochs."""
        return replace(self, epochs=2 * self.epochs)

    @property
    def images_seen(self) -> int:
        """Training images times epochs."""
        return self.train_images * self.epochs

    @property
    def original(self) -> Variant:
        """The variant that the others are compared with."""
        return FAMILIES[self.family][0]

    def autocast(self) -> torch.autocast:
        """The context in which models run."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bfloat16')

    def create(self, variant: Variant, seed: int) -> nn.Module:
        """A new model where it is to be trained."""
        model = create(self.family, variant, self.depth, seed, self.bottlenecks, self.stem_stride)
        return model.to(self.device, memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module, new_lr_scale: float = 1.0) -> torch.optim.Optimizer:
        """The family's optimizer over what reaches the output, with another rate for what was put in."""
        for parameter in set(model.parameters()) - set(sem_timm.trainable_parameters(model)):
            parameter.requires_grad_(False)
        options = _OPTIMIZERS[self.family]
        if new_lr_scale == 1:
            return create_optimizer_v2(model, **options)
        new = inserted_parameters(model)
        base = [parameter for name, parameter in model.named_parameters() if name not in new]
        groups = [{'params': base}, {'params': list(new.values()), 'lr': new_lr_scale * options['lr']}]
        return create_optimizer_v2(groups, **options)


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    variant: Variant
    augmentation: str
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What the log knows it by."""
        run = {'variant': self.variant.name, 'augmentation': self.augmentation, 'seed': self.seed}
        return {'setting': self.setting.key, **run}

    def __str__(self) -> str:
        return f'{self.setting.family} {self.variant.name}, augmentation {self.augmentation}, seed {self.seed}'


def train_and_measure(run: Run, train: TensorDataset, test: TensorDataset, folder: Path) -> dict[str, Any]:
    """Trains a new model, or goes on with one from a folder of trainings that were stopped, and leaves its file there.

    Returns:
        Its test accuracy after the last epoch, in percent, and figures of the training.
    """
    model = run.setting.create(run.variant, run.seed)
    state = _train(model, run, train, folder)
    losses = [round(loss, 4) if math.isfinite(loss) else None for loss in state['losses']]
    return {
        'accuracy': round(100 * accuracy(model, test, run.setting), 2),
        'train_loss': losses[-1],
        'losses': losses,
        **({'decided': state['decided']} if state['decided'] else {}),
        **_decided(model, test, 'mean', 'gate_mean', 'gate_contrast'),
        'without_gradient': state['without_gradient'],
        'parameters': sum(parameter.numel() for parameter in sem_timm.trainable_parameters(model)),
        'seconds': round(state['seconds'], 1),
        'cpu_seconds': round(state['cpu_seconds'], 1),
    }


def _without_gradient(model: nn.Module) -> list[str]:
    """Names of new parameters whose last gradient was exactly zero."""
    gradients = {name: parameter.grad for name, parameter in inserted_parameters(model).items()}
    return [name for name, grad in gradients.items() if grad is not None and not grad.any()]


def _decided(model: nn.Module, data: TensorDataset, *names: str) -> dict[str, dict[str, float]]:
    """Figures of `sem_timm.decisions` over the first 500 images, by operator as means over blocks.

    Empty where nothing decides.
    """
    if not any(isinstance(module, sem_timm.SEM) and module.decision is not None for module in model.modules()):
        return {}
    told = sem_timm.decisions(model, data.tensors[0][:500].split(100))
    means = {name: getattr(told, name).nanmean(0).tolist() for name in names}
    return {
        name: {operator: round(value, 4) for operator, value in zip(told.operators, values)}
        for name, values in means.items()
    }


def _train(model: nn.Module, run: Run, train: TensorDataset, folder: Path) -> dict[str, Any]:
    """Trains a model in place, and keeps after each epoch what a training that is stopped goes on from.

    Returns:
        The mean loss of each epoch, 'losses', what SEM decides at the end of each, 'decided', the new parameters whose
        last gradient was zero, 'without_gradient', and 'seconds' and 'cpu_seconds' of all epochs.
    """
    setting = run.setting
    images, labels = (tensor[: setting.train_images].to(setting.device) for tensor in train.tensors)
    steps = len(images) // setting.batch_size
    optimizer = setting.optimizer(model, run.variant.new_lr_scale)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        {'cosine': 'cosine', 'drops': 'multistep'}[setting.schedule],
        num_epochs=setting.epochs,
        decay_milestones=[setting.epochs // 2, setting.epochs * 3 // 4],
        step_on_epochs=False,
        updates_per_epoch=steps,
        warmup_epochs=0.2,
        warmup_lr=1e-5,
    )
    # The order and the crops are those of the seed alone, whatever random numbers the model took.
    generator = torch.Generator().manual_seed(run.seed)
    model.train()
    total = torch.zeros((), device=setting.device)
    kept = Kept(folder, run.key, model, optimizer, generator)
    state = kept.restored()
    for epoch in range(len(state['losses']), setting.epochs):
        start, cpu = time.perf_counter(), time.process_time()
        total.zero_()
        order = torch.randperm(len(images), generator=generator)[: steps * setting.batch_size]
        for step, chosen in enumerate(order.split(setting.batch_size)):
            batch = images[chosen]
            if run.augmentation != 'none':
                batch = crop_and_flip(batch, generator)
            loss = _step(model, optimizer, batch, labels[chosen], setting)
            scheduler.step_update(epoch * steps + step + 1)
            total += loss
        state['losses'].append(float(total) / steps)
        state['seconds'] += time.perf_counter() - start
        state['cpu_seconds'] += time.process_time() - cpu
        state['decided'] += _decided(model, train, 'mean').values()  # one for each epoch, or none
        state['without_gradient'] = _without_gradient(model)
        kept.save(state)
    return state


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, setting: Setting
) -> Tensor:
    """One update; returns the loss."""
    with setting.autocast():
        logits = model(images.contiguous(memory_format=torch.channels_last))
    loss = cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset, setting: Setting) -> float:
    """The part of the images that a model, then in eval mode, reads right."""
    model.eval()
    right = 0
    for images, labels in zip(*(tensor.split(500) for tensor in data.tensors)):
        with setting.autocast():
            logits = model(images.to(setting.device).contiguous(memory_format=torch.channels_last))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(data)


def cost(setting: Setting, names: Collection[str], rounds: int = 7) -> dict[str, float]:
    """The time of one training step of each variant against the original's, taken in turns."""
    images = torch.randn(setting.batch_size, 1, 28, 28, device=setting.device)
    labels = torch.randint(10, (setting.batch_size,), device=setting.device)
    calls = {}
    for variant in FAMILIES[setting.family]:
        if variant != setting.original and variant.name not in names:
            continue
        model = setting.create(variant, 0).train()
        optimizer = setting.optimizer(model)
        calls[variant.name] = lambda model=model, optimizer=optimizer: _step(model, optimizer, images, labels, setting)
    times = take_turns(calls, rounds, setting.device)
    return {name: round(times.ratio(name, setting.original.name), 3) for name in calls}
