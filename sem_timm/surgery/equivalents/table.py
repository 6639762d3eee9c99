"""What a forward is read from: its own code, or an equivalent of it where that code cannot be followed.

An equivalent is a function with the signature of the other which computes the same in plain operations. Whoever reads
graphs reads the equivalent; the proofs compare what becomes of it, in numbers, with the original. One that a new model
needs is one entry more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from sem_timm.surgery.equivalents.attention import encoder_layer, multi_head_attention
from sem_timm.surgery.equivalents.einsum import einsum
from sem_timm.surgery.equivalents.windows import shifted_window_attention

# By module and name, so that no library is imported to find out that it is not used.
_FORWARDS: dict[str, Any] = {
    'torch.nn.modules.activation.MultiheadAttention.forward': multi_head_attention,
    'torch.nn.modules.transformer.TransformerEncoderLayer.forward': encoder_layer,
}
_FUNCTIONS: dict[str, Any] = {
    'torch.functional.einsum': einsum,
    'torchvision.models.swin_transformer.shifted_window_attention': shifted_window_attention,
}

# What a class is given beside its forward where attention was swapped. Encoder layers of torch compute their attention
# by themselves in inference, and never call it, unless something about it forbids that.
_ATTRIBUTES: dict[type, dict[str, Any]] = {
    nn.MultiheadAttention: {'_qkv_same_embed_dim': property(lambda self: False)},
}


def equivalent_of(function: Any) -> Callable[..., Any] | None:
    """What computes the same as a function, spelled out; None for a function that is read as it is."""
    return _FUNCTIONS.get(_name(function))


def attributes_of(cls: type) -> dict[str, Any]:
    """Attributes that a class with another attention needs beside its forward."""
    return {key: value for base in reversed(cls.__mro__) for key, value in _ATTRIBUTES.get(base, {}).items()}


def forward_of(cls: type) -> FunctionType:
    """The function that the forward of a module class is read from."""
    return _forward_of(cls, cls.forward)  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _forward_of(cls: type, forward: Any) -> FunctionType:
    code = getattr(forward, '__code__', None)
    if is_rewrapped(cls, forward):
        # Once for each class that it derives from.
        while hasattr(forward, '__wrapped__') and forward.__code__ is code:
            forward = forward.__wrapped__
    found: FunctionType = _FORWARDS.get(_name(forward), forward)
    return found


def is_rewrapped(cls: type, forward: Any) -> bool:
    """Whether a class wraps the forward of every class derived from it as it has wrapped its own.

    What such a wrapper does, such as checkpointing, it does for a patched class as well: the forward inside is read.
    """
    if not hasattr(forward, '__wrapped__') or not hasattr(forward, '__code__'):
        return False

    def plain(self: nn.Module) -> None: ...

    try:
        derived: Any = type(cls)(cls.__name__, (cls,), {'forward': plain, '__module__': cls.__module__})
    except Exception:  # a class that forbids others to derive from it
        return False
    wrapped = derived.forward
    return getattr(wrapped, '__wrapped__', None) is plain and wrapped.__code__ is forward.__code__


def _name(function: Any) -> str:
    return f'{getattr(function, "__module__", "")}.{getattr(function, "__qualname__", "")}'
