"""What a forward costs, part by part, measured on the meta device: nothing is computed, and no weight is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sem_timm.errors import ModelError
from sem_timm.meta import dtype_of

# Batch norm wants more than one value per channel, which a batch of one does not have behind a global pool.
TRAINING_BATCH = 2


@dataclass(frozen=True)
class Cost:
    """What a part of a model costs for one image.

    Attributes:
        parameters: Number of parameters, frozen ones included.
        macs: Multiply-accumulate operations of a forward in convolutions, matrix products and attention.
        activation_bytes: Bytes that a training forward keeps for the backward pass, beside parameters and buffers.
    """

    parameters: int = 0
    macs: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.macs + other.macs,
            self.activation_bytes + other.activation_bytes,
        )


def measured(skeleton: nn.Module, input_size: tuple[int, ...], part_of: Callable[[str], str]) -> dict[str, Cost]:
    """The cost of each part of a weightless model, which this changes.

    Args:
        skeleton: The model, on the meta device. Which of its parameters require gradients decides what is kept.
        input_size: Shape (C, H, W) of the image.
        part_of: The part that a module belongs to, by the module's name.

    Raises:
        ModelError: If the model does not run there.
    """
    parameters: dict[str, int] = {}
    for name, parameter in skeleton.named_parameters():
        part = part_of(name.rpartition('.')[0])
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    with _Parts(skeleton, part_of) as parts:
        macs = _macs(skeleton, input_size, parts)
        kept = _kept_bytes(skeleton, input_size, parts)
    names = dict.fromkeys(part_of(name) for name, _ in skeleton.named_modules())
    return {name: Cost(parameters.get(name, 0), macs.get(name, 0), kept.get(name, 0)) for name in names}


class _Parts:
    """Follows a model through its forwards while it is entered, so that it is known which part is running.

    Listens to all modules of the process: hooks on the model's own would change what it does, as adapters on a packed
    projection make it compute all its rows.

    Attributes:
        current: The part that is running.
        on_change: Called before it becomes another.
    """

    def __init__(self, model: nn.Module, part_of: Callable[[str], str]) -> None:
        self.current = part_of('')
        self.on_change: Callable[[], None] | None = None
        self._parts = {module: part_of(name) for name, module in model.named_modules()}
        self._outer: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Parts:
        self._handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._parts:
            self._outer.append(self.current)
            self._change(self._parts[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._parts:
            self._change(self._outer.pop())

    def _change(self, part: str) -> None:
        if part != self.current and self.on_change is not None:
            self.on_change()
        self.current = part


def _macs(model: nn.Module, input_size: tuple[int, ...], parts: _Parts) -> dict[str, int]:
    flops: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def settle() -> None:
        flops[parts.current] = flops.get(parts.current, 0) + counter.get_total_flops() - sum(flops.values())

    parts.on_change = settle
    with torch.no_grad(), counter:
        _run(model.eval(), input_size, 1)
        settle()
    parts.on_change = None
    return {part: count // 2 for part, count in flops.items()}


def _kept_bytes(model: nn.Module, input_size: tuple[int, ...], parts: _Parts) -> dict[str, int]:
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}  # they are held, so that none gets the place of another
    kept: dict[str, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage
            kept[parts.current] = kept.get(parts.current, 0) + storage.nbytes()
        return tensor

    hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, _FusedAttention():
        output = _run(model.train(), input_size, TRAINING_BATCH)
    del output
    return {part: size // TRAINING_BATCH for part, size in kept.items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(model: nn.Module, input_size: tuple[int, ...], batch_size: int) -> Any:
    images = torch.empty(batch_size, *input_size, dtype=dtype_of(model), device='meta')
    mode = 'training' if model.training else 'eval'
    try:
        return model(images)
    except Exception as error:  # any exception of a foreign forward
        raise ModelError(
            f'{type(model).__name__} does not run on the meta device in {mode} mode at {input_size}: '
            f'{type(error).__name__}: {error}'
        ) from error


class _FusedAttention(TorchFunctionMode):
    """Lets scaled_dot_product_attention keep what its fused kernels keep.

    On the meta device it would be taken apart, and keep the table of pairs of tokens that processors and GPUs do not.
    Where biases that are trained go into it, it is taken apart on a processor too.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given: dict[str, Any] = {
                **dict(zip(('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal'), args)),
                **kwargs,
            }
            query, key, value, mask = given['query'], given['key'], given['value'], given.get('attn_mask')
            learned = isinstance(mask, Tensor) and mask.requires_grad and torch.is_grad_enabled()
            alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]
            if alike and not learned:
                mask = mask.to(query.dtype) if isinstance(mask, Tensor) else None
                causal = bool(given.get('is_causal', False))
                fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                return fused(query, key, value, 0.0, causal, attn_mask=mask)[0]
        return func(*args, **kwargs)
