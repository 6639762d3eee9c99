"""What FSDP has spread over processes, put together again."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.state import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether models are spread over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a sharded model with all its values, on the CPU; all processes call it, and all get it.

    Args:
        accelerator: What sharded the model.
        model: The model as it came back.
    """
    if accelerator.is_fsdp2:
        return {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    settings = FullStateDictConfig(offload_to_cpu=True, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, settings):
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _whole(tensor: Any) -> Tensor:
    # One after the other, so that on the GPU no more than one is whole at a time.
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor
    return whole.detach().cpu()
