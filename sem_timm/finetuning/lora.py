"""Low-rank adapters of PEFT on the layers of the base, while it is trained: https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sem_timm.errors import MissingPackageError, OptionError
from sem_timm.finetuning.models import head_parameters, inserted_parameters
from sem_timm.finetuning.options import LORA, FinetuneOptions

_ADAPTER = 'lora_'


def insert_adapters(model: nn.Module, options: FinetuneOptions) -> None:
    """Puts adapters around the linear layers and convolutions of a model if they are to be trained.

    Convolutions in groups, new modules and the head are left out. The outputs stay what they were.

    Raises:
        MissingPackageError: If PEFT is not installed.
        OptionError: If there is no such layer.
    """
    if LORA not in options.trained_parts:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackageError("train='lora' needs PEFT, which is not installed. Do: pip install peft") from error
    others = {*inserted_parameters(model), *head_parameters(model)}
    names = [
        name for name, module in model.named_modules() if _takes_adapter(module) and f'{name}.weight' not in others
    ]
    if not names:
        raise OptionError(f"train='lora': {type(model).__name__} has no linear layer or convolution that takes one.")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_rank, target_modules='|'.join(re.escape(name) for name in names)
    )
    inject_adapter_in_model(config, model)
    for parameter, requires_grad in trained:  # which PEFT has frozen, the head too
        parameter.requires_grad_(requires_grad)


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of adapters."""
    return {name for name, _ in model.named_parameters() if f'.{_ADAPTER}' in name}


def merge_adapters(model: nn.Module) -> None:
    """Adds what adapters have learned to the weights of their layers, and takes the adapters out."""
    if not adapter_parameters(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            adapted: Any = module
            adapted.merge()
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, adapted.get_base_layer())
