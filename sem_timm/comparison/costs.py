"""What a row costs: parameters and arithmetic counted, a training step measured in turns with one of the baseline."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from sem_timm.errors import ModelError, OptionError, SemTimmError
from sem_timm.finetuning import FinetuneOptions
from sem_timm.finetuning.freezing import Freezing
from sem_timm.finetuning.groups import create_optimizer
from sem_timm.finetuning.lora import insert_adapters
from sem_timm.finetuning.losses import create_loss
from sem_timm.finetuning.models import (
    create_model,
    data_config,
    inserted_parameters,
    operate,
    operation_name,
    save_if_patch,
)
from sem_timm.random_state import preserved_random_state
from sem_timm.reports import summary
from sem_timm.reports.measuring import peak_mib
from sem_timm.surgery import patched_modules

_ROUNDS = 7
_LONGEST_STEP = 0.5  # seconds; images are left out of a step until it is no longer
_SHORTEST_SERIES = 0.05  # seconds, over which one figure is taken
_LARGEST_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a row costs.

    Attributes:
        parameters: Number of parameters.
        new_parameters: Those that the operation added.
        trained_parameters: Those that are trained.
        macs: Multiply-accumulate operations of a forward of one image; None if they cannot be counted.
        file_bytes: Size of the files with what was trained, to be kept beside the base.
        baseline: Name of the row that time and memory are compared with.
        batch_size: Images of the training step that was measured.
        step_seconds: Time of that step; None where it was not measured, as the rest.
        step_ratio: That over the time of the baseline, median of rounds in which both took turns.
        peak_mib: Peak MiB that the step allocates beside parameters and the state of the optimizer.
        peak_ratio: That over the peak of the baseline.
        machine: Device and threads.
    """

    parameters: int
    new_parameters: int
    trained_parameters: int
    macs: int | None
    file_bytes: int
    baseline: str
    batch_size: int | None = None
    step_seconds: float | None = None
    step_ratio: float | None = None
    peak_mib: float | None = None
    peak_ratio: float | None = None
    machine: str = ''

    def to_dict(self) -> dict[str, Any]:
        """The costs as data that `json.dumps` takes."""
        return asdict(self)


def build_model(options: FinetuneOptions, num_classes: int) -> nn.Module:
    """The model of a run as it is trained, with random weights.

    Raises:
        SemTimmError: If the operation is refused, or nothing is left to train.
    """
    plain = replace(options, pretrained=False, weights=None)
    model = create_model(plain, num_classes)
    if patched_modules(model):
        raise OptionError(
            f'{options.model} has {operation_name(model)} already, so that no row would be without. Give the base, and '
            'the operation as a row, such as --operations none,sem:reduction=8.'
        )
    operate(model, plain, data_config(model, plain)['input_size'])
    insert_adapters(model, plain)
    Freezing(model, plain)
    return model


def count_costs(options: FinetuneOptions, model: nn.Module, baseline: str) -> Costs:
    """What can be counted of a model as `build_model` makes it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        macs: int | None = summary(model, data_config(model, options)['input_size']).patched.macs
    except SemTimmError:  # such as of a model that has adapters, or does not run on the meta device
        macs = None
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        new_parameters=sum(p.numel() for p in inserted_parameters(model).values()),
        trained_parameters=sum(p.numel() for p in trained),
        macs=macs,
        file_bytes=_file_bytes(options, model),
        baseline=baseline,
    )


def _file_bytes(options: FinetuneOptions, model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder, suppress(ModelError):  # such as of an operation that no file can name
        if save_if_patch(model, options, folder):
            return sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    kept = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    return len(save(kept))


class StepMeter:
    """Measures training steps in turns with one of the baseline.

    Args:
        options: Those of a run of the baseline.
        model: Its model, as `build_model` makes it; moved to the device and trained a little.
        device: Where the steps run.
    """

    def __init__(self, options: FinetuneOptions, model: nn.Module, device: torch.device) -> None:
        self._device = device
        with preserved_random_state():
            self._size = _batch_size(options, model.to(device), device)
            self._base = _step(options, model, self._size, device)
            self._base_peak = peak_mib(self._base, device.type)

    def measure(self, costs: Costs, options: FinetuneOptions, model: nn.Module) -> Costs:
        """Costs with time and peak memory of a step of another model."""
        with preserved_random_state():
            step = _step(options, model.to(self._device), self._size, self._device)
            seconds, ratio = _take_turns(step, self._base, self._device)
            peak = peak_mib(step, self._device.type)
        return replace(
            costs,
            batch_size=self._size,
            step_seconds=seconds,
            step_ratio=ratio,
            peak_mib=peak,
            peak_ratio=peak / self._base_peak,
            machine=_machine(self._device),
        )


def _machine(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads, {os.uname().machine}'


def _step(options: FinetuneOptions, model: nn.Module, size: int, device: torch.device) -> Callable[[], None]:
    """A training step on random images."""
    shape = data_config(model, options)['input_size']
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images = torch.randn(size, *shape, device=device).contiguous(memory_format=layout)
    labels = torch.zeros(size, dtype=torch.long, device=device)
    optimizer, loss = create_optimizer(model, options), create_loss(replace(options, mixup=0.0, cutmix=0.0))
    Freezing(model, options).set_training_mode(model)
    precision = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(options.precision)

    def step() -> None:
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            logits = model(images)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        loss(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch_size(options: FinetuneOptions, model: nn.Module, device: torch.device) -> int:
    """Images of a step that is short enough to be measured in turns."""
    size = max(2, min(options.batch_size // options.accumulate, _LARGEST_BATCH))
    while size > 2:
        step = _step(options, model, size, device)
        _seconds(step, 1, device)
        if _seconds(step, 1, device) <= _LONGEST_STEP:
            break
        size = max(2, size // 2)
    return size


def _take_turns(step: Callable[[], None], base: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Median seconds of a step, and the median ratio to those of another that took turns with it."""
    calls = (step, base)
    lengths = []
    for call in calls:
        _seconds(call, 1, device)
        lengths.append(max(1, round(_SHORTEST_SERIES / max(_seconds(call, 1, device), 1e-6))))
    rounds = []
    for number in range(_ROUNDS):
        order = (0, 1) if number % 2 else (1, 0)
        taken = {which: _seconds(calls[which], lengths[which], device) for which in order}
        rounds.append((taken[0], taken[1]))
    return statistics.median(a for a, _ in rounds), statistics.median(a / b for a, b in rounds)


def _seconds(call: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one call, over so many in a row."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()
