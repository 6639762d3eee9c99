"""An architecture of timm before anything is done to it: its model, its images, and what it computes with them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import timm
import torch
from torch import Tensor, nn

import sem_timm
from tests.families import create
from tests.outputs import loss_of, outputs, tensors

OPERATIONS = ('sem', 'external')
MAX_PARAMETERS = 100_000_000
SIZES = (32, 64, 96, 128, 160, 192, 224)  # of images, tried before the model's own


@dataclass
class Step:
    """A training step without an update: the outputs, and the gradients of the parameters that got one."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Step:
        """Runs ``model`` in training mode; everything random in it starts from the same seed each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            leaves = tensors(model.train()(images))
        loss_of(leaves).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return cls([leaf.detach() for leaf in leaves], gradients)


class Subject:
    """An unpatched model, its images, and what it computes with them.

    Args:
        architecture: Its name in timm.
        smallest: Whether its images are the smallest it takes, or those of its configuration.

    Attributes:
        parameters: Their number.
        model: The model, with the same random weights each time.
        images: Two images.
        probe: Shape (C, H, W) to plan with, where it is not the one that the model's configuration names.
    """

    def __init__(self, architecture: str, smallest: bool = True) -> None:
        self.architecture = architecture
        with torch.device('meta'):
            model = timm.create_model(architecture)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        size = int(model.pretrained_cfg['input_size'][-1])
        self.probe: tuple[int, ...] | None = None
        if self.parameters > MAX_PARAMETERS:
            self.model, self.images = model.eval(), _images(model, size)
        elif not smallest:
            self.model = create(architecture)
            self.images = _images(self.model, size)
        else:
            self.model, self.images, self.probe = _smallest(architecture, size)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """In inference."""
        return outputs(self.model, self.images)

    @cached_property
    def step(self) -> Step:
        """In training."""
        return Step.of(copy.deepcopy(self.model), self.images)


def _smallest(architecture: str, own: int) -> tuple[nn.Module, Tensor, tuple[int, ...] | None]:
    """The model and the smallest images it takes, created for that size where the size is fixed, and then the probe.

    So small that a window or a stage is left with a single token, and fewer modules can be patched, is too small.
    """
    model = create(architecture)
    sizes = [size for size in SIZES if size < own]
    for size in sizes:
        images = _images(model, size)
        if _takes(model, images):
            return model, images, None
    sites = _numbers_of_sites(model)
    for size in sizes:
        try:
            smaller = create(architecture, img_size=size)
        except Exception:  # there is no such option, or the size does not suit the model
            continue
        images = _images(smaller, size)
        probe = tuple(images.shape[1:])
        if _takes(smaller, images) and _numbers_of_sites(smaller, probe) == sites:
            return smaller, images, probe
    return model, _images(model, own), None


def _numbers_of_sites(model: nn.Module, probe: tuple[int, ...] | None = None) -> list[int]:
    """For each operation; none where the model is refused."""
    numbers = []
    for operation in OPERATIONS:
        try:
            numbers.append(len(sem_timm.plan_model(model, operation, input_size=probe)))
        except sem_timm.RefusedError:
            numbers.append(0)
    return numbers


def _takes(model: nn.Module, images: Tensor) -> bool:
    try:
        Step.of(copy.deepcopy(model), images)
        return all(output.isfinite().all() for output in outputs(model, images))
    except Exception:  # whatever the model says of images that do not suit it
        return False


def _images(model: nn.Module, size: int) -> Tensor:
    shape = 2, int(model.pretrained_cfg['input_size'][0]), size, size
    if next(model.parameters()).is_meta:
        return torch.empty(shape, device='meta')
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
