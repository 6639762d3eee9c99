"""Images through a patched model: what its gates do, and how often it names the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sem_timm.batches import Loader, read_batches
from sem_timm.errors import ModelError, OptionError
from sem_timm.folding.moments import GateMoments
from sem_timm.layers import ChannelGate, ScaleAndShift
from sem_timm.meta import dtype_of
from sem_timm.reports.image_shape import explained_shape
from sem_timm.reports.isolation import device_of

# What is folded: gates as their means, scales and shifts as they are.
Folded: TypeAlias = ChannelGate | ScaleAndShift

# Images on which a fold is compared with a constant gate.
NUM_COMPARED = 2


@dataclass
class Pass:
    """One pass over the images.

    Attributes:
        num_images: How many there were.
        right: How many of them the model named the class of; None where there are no labels.
        first: The first images, for comparisons.
    """

    num_images: int = 0
    right: int | None = None
    first: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def accuracy(self) -> float | None:
        """The part of the images whose class was named, in percent."""
        return None if self.right is None else 100.0 * self.right / self.num_images


@torch.no_grad()
def run(model: nn.Module, loader: Loader, max_batches: int | None) -> Pass:
    """Runs a model on all images.

    Raises:
        OptionError: If there are none, their shape is another, or only some have labels.
    """
    where, dtype, done = device_of(model), dtype_of(model), Pass()
    labelled: set[bool] = set()
    for images, labels in islice(read_batches(loader), max_batches):
        images = images.to(where, dtype, non_blocking=True)
        with explained_shape(model, images):
            logits = model(images)
        if not done.num_images:
            done.first = images[:NUM_COMPARED].clone()
        done.num_images += len(images)
        labelled.add(labels is not None)
        if labels is not None:
            done.right = (done.right or 0) + _right(logits, labels)
    if not done.num_images:
        raise OptionError('the loader yields no images; folding needs some of the kind that the model is for.')
    if len(labelled) > 1:
        raise OptionError('the loader yields labels with some batches and none with others; give all of them or none.')
    return done


def _right(logits: Any, labels: Any) -> int:
    try:
        classes = torch.as_tensor(labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _no_classes(f'of type {type(labels).__name__}') from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise OptionError('the model returns no logits (B, classes), so that there is no accuracy: give images alone.')
    if classes.dtype in (torch.bool,) or classes.is_floating_point() or classes.shape != logits.shape[:1]:
        raise _no_classes(f'of shape {tuple(classes.shape)} and {classes.dtype} with {len(logits)} images')
    return int((logits.argmax(1).cpu() == classes.cpu()).sum())


def _no_classes(form: str) -> OptionError:
    return OptionError(
        f'the loader yields labels {form}; accuracy needs whole numbers (B,), the class of each image, such as '
        'labels.argmax(1) of one-hot labels. With images alone, gates are folded without it.'
    )


@contextmanager
def observed(gates: Mapping[str, Folded]) -> Iterator[dict[str, GateMoments]]:
    """What some gates, or scales, do while a model runs, by name; of one that is not run there is nothing."""
    found: dict[str, GateMoments] = {}

    def look(name: str, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs['x']
        axis = gate.channel_dim % x.ndim
        energy = x.float().square().sum([place for place in range(1, x.ndim) if place != axis])
        vector = gate.gate(x) if isinstance(gate, ChannelGate) else gate.get_parameter('scale').expand(len(x), -1)
        if not all(numbers.isfinite().all() for numbers in (vector, energy, *gate.parameters())):
            raise ModelError(f'the gate {name} gives numbers that are not finite; weights or images are not.')
        found.setdefault(name, GateMoments()).update(vector, energy)

    hooks = [gate.register_forward_pre_hook(partial(look, n), with_kwargs=True) for n, gate in gates.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def calls_of(model: nn.Module, names: set[str], images: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What some modules are given in one forward: copies of it, by name."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def look(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(name, tree_map_only(Tensor, torch.clone, (args, kwargs)))

    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(look, n), with_kwargs=True) for n in names]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
