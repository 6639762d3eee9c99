"""The parts of a run: built from its options, and put around by accelerate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sem_timm.compat import create_scheduler
from sem_timm.errors import OptionError
from sem_timm.finetuning.datasets import Data, open_data
from sem_timm.finetuning.freezing import Freezing
from sem_timm.finetuning.groups import create_optimizer
from sem_timm.finetuning.loading import TrainingLoader, ValidationLoader
from sem_timm.finetuning.lora import insert_adapters
from sem_timm.finetuning.losses import check_pairs, create_loss, create_mixup
from sem_timm.finetuning.models import check_operation, create_model, data_config, operate, scale_head
from sem_timm.finetuning.options import FinetuneOptions
from sem_timm.finetuning.samples import Samples
from sem_timm.finetuning.sampling import Share
from sem_timm.finetuning.sharding import is_sharded, whole_state


@dataclass
class Parts:
    """What a trainer works with.

    Attributes:
        accelerator: Processes, precision and trackers.
        data: The samples.
        model: The model as accelerate wraps it.
        optimizer: The optimizer as accelerate wraps it.
        scheduler: timm's; the learning rate is a function of the step alone.
        freezing: Which part of the model is trained.
        average: The moving average of the weights, or None.
        training: Training batches.
        validation: Validation batches.
        loss: The loss.
        mixup: What mixes images, or None.
        memory_format: Memory layout of images.
        whole: A copy of the model on the CPU, with the weights of the beginning, where FSDP shards the model itself.
    """

    accelerator: Accelerator
    data: Data
    model: Any
    optimizer: Any
    scheduler: Any
    freezing: Freezing
    average: Any
    training: TrainingLoader
    validation: ValidationLoader
    loss: nn.Module
    mixup: Any
    memory_format: torch.memory_format
    whole: nn.Module | None = None

    @property
    def bare_model(self) -> nn.Module:
        """The model without what is around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def measured_model(self) -> nn.Module:
        """The model that accuracy is measured of: the average where there is one."""
        if self.average is not None:
            average: nn.Module = self.average.module
            return average
        return self.model if is_sharded(self.accelerator) else self.bare_model

    def final_model(self) -> nn.Module:
        """The model that is handed out: the average where there is one, and nothing around it."""
        if self.average is not None:
            average: nn.Module = self.average.module
            return average
        if self.whole is not None:
            self.whole.load_state_dict(whole_state(self.accelerator, self.model))
            return self.whole
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model

    def wrap_again(self) -> None:
        """Wraps the model anew, after parameters have begun to require gradients."""
        if self.accelerator.num_processes > 1:
            model = self.bare_model
            self.accelerator._models.clear()
            self.model = self.accelerator.prepare_model(model)

    def in_layout(self, images: Tensor) -> Tensor:
        """Images in the memory layout of the model."""
        return images.contiguous(memory_format=self.memory_format)

    def learning_rate(self) -> float:
        """The learning rate of groups without a factor of their own."""
        group = self.optimizer.param_groups[0]
        return float(group['lr'] / (group['lr_scale'] or 1.0))


def create_accelerator(options: FinetuneOptions) -> Accelerator:
    """The accelerator of a run; under a launcher it joins the other processes.

    Raises:
        OptionError: If this machine cannot do what the options ask for.
    """
    # A run before this one, in the same process, may have had another precision.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.precision)
    except ValueError as error:
        raise OptionError(f'precision={options.precision!r}: {error} Use bf16, or no.') from error
    if options.precision == 'fp16' and accelerator.device.type == 'cpu':
        raise OptionError("precision='fp16' needs a GPU. Use bf16, or no.")
    if options.sync_bn and accelerator.device.type == 'cpu':
        raise OptionError('sync_bn needs GPUs: torch synchronises batch norms only there.')
    if is_sharded(accelerator) and (options.ema or options.unfreeze_every is not None):
        raise OptionError('ema and unfreeze_every need whole models in each process; use them without FSDP.')
    return accelerator


def build_parts(options: FinetuneOptions, accelerator: Accelerator, network: nn.Module | None = None) -> Parts:
    """Builds everything a run needs, on all processes alike; ``network`` takes the place of a model by name."""
    share = _share(options, accelerator)
    set_seed(options.seed)
    with accelerator.main_process_first():  # so that one alone downloads
        data, model, config = data_and_model(options, share.part_size, network)
    if options.resume is None:
        check_operation(model, options)
        scale_head(model, options.head_scale)
    operate(model, options, config['input_size'])
    insert_adapters(model, options)
    if options.sync_bn:  # before anything keeps the norms that it replaces
        model = convert_sync_batchnorm(model)
    memory_format = _memory_format(options)
    model = model.to(device=accelerator.device).to(memory_format=memory_format)
    freezing = Freezing(model, options)
    optimizer = create_optimizer(model, options)
    freezing.start()
    average = None if options.ema is None else ModelEmaV3(model, decay=options.ema, use_warmup=True)
    if options.compile:
        model.compile()
    training = TrainingLoader(data, options, config, share, accelerator.device)
    validation = ValidationLoader(data, options, config, share, accelerator.device)
    whole = copy.deepcopy(model).cpu() if is_sharded(accelerator) else None
    model, optimizer = accelerator.prepare(model, optimizer)
    if average is not None:
        accelerator.register_for_checkpointing(average)
    scheduler = _create_scheduler(options, optimizer, training.num_updates)
    set_seed(options.seed + 1 + accelerator.process_index)  # dropout differs between processes
    return Parts(
        accelerator=accelerator,
        data=data,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        freezing=freezing,
        average=average,
        training=training,
        validation=validation,
        loss=create_loss(options),
        mixup=create_mixup(options, data.num_classes),
        memory_format=memory_format,
        whole=whole,
    )


def _memory_format(options: FinetuneOptions) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def _share(options: FinetuneOptions, accelerator: Accelerator) -> Share:
    share = Share(accelerator.process_index, accelerator.num_processes, options.batch_size, options.accumulate)
    if share.part_size * share.num_processes * share.accumulate != share.batch_size:
        raise OptionError(
            f'batch_size={share.batch_size} cannot be shared by {share.num_processes} processes in '
            f'accumulate={share.accumulate} parts each; it counts the images of all of them.'
        )
    check_pairs(options, share.part_size)
    return share


def data_and_model(
    options: FinetuneOptions, part_size: int, network: nn.Module | None = None
) -> tuple[Data, nn.Module, dict[str, Any]]:
    """The images of a run, its model before any operation, and what timm's transforms are made from."""
    data = open_data(options, part_size=part_size)
    model = create_model(options, data.num_classes) if network is None else network
    config = data_config(model, options)
    if config['input_size'][0] == 1:
        for samples in (data.train, data.validation):
            if isinstance(samples, Samples):
                samples.mode = 'L'
            else:
                samples.reader.input_img_mode = 'L'
    return data, model, config


def _create_scheduler(options: FinetuneOptions, optimizer: Any, num_updates: int) -> Any:
    warmup: Any = min(options.warmup_epochs, options.epochs / 2)  # timm counts in updates, so that parts are fine
    try:
        return create_scheduler(
            optimizer,
            options.schedule,
            num_epochs=options.epochs,
            decay_epochs=None if options.schedule == 'wsd' else max(1, options.epochs // 3),
            decay_milestones=[options.epochs // 2, options.epochs * 3 // 4],
            decay_rate=1.0 if options.schedule == 'poly' else 0.1,
            min_lr=options.min_lr,
            warmup_lr=options.lr / 100,
            warmup_epochs=warmup,
            step_on_epochs=False,
            updates_per_epoch=num_updates,
        )
    except (ValueError, AssertionError) as error:
        raise OptionError(f'schedule {options.schedule!r}: {error}') from error
