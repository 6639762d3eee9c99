"""Fingerprints of tensors, to tell whether a model has the weights that a patch was trained with.

A fingerprint is a hash of the values in their logical order, so it does not depend on device and memory layout. Hashes
of the values rounded to each narrower floating-point type stand beside it: a model that was merely cast is recognised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Digests = dict[str, str]

# Types by name, each with the narrower ones that a model may be cast to.
_HALVES = (torch.float16, torch.bfloat16)
_NARROWER = {torch.float64: (torch.float32, *_HALVES), torch.float32: _HALVES}

# Counts batches for a moving average that nobody uses; no output depends on it.
_COUNTER = 'num_batches_tracked'


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one tensor.

    Attributes:
        dtype: Its type by name, such as 'float32'.
        shape: Its shape.
        digests: Hashes of its values, by the type they were rounded to; its own type comes first.
    """

    dtype: str
    shape: tuple[int, ...]
    digests: Digests

    def compare(self, tensor: Tensor) -> str | None:
        """None for a tensor with the same values, up to a cast of one of both; else in which way it differs."""
        if tuple(tensor.shape) != self.shape:
            return f'has the shape {tuple(tensor.shape)}, not {self.shape}'
        dtype = dtype_name(tensor.dtype)
        # Values of both are compared in the narrower of the two types; float16 and bfloat16 have none.
        common = dtype if dtype in self.digests else self.dtype
        if not (dtype in self.digests or self._dtype in _NARROWER.get(tensor.dtype, ())):
            return f'is {dtype}, not {self.dtype}, between which there is no exact cast'
        if digest(tensor.to(getattr(torch, common))) == self.digests[common]:
            return None
        for narrow in _NARROWER.get(tensor.dtype, ()):
            # Values that a narrow type holds exactly, and that are the old ones rounded to it.
            rounded, name = tensor.to(narrow), dtype_name(narrow)
            if torch.equal(rounded.to(tensor.dtype), tensor) and digest(rounded) == self.digests.get(name):
                return f'was rounded to {name}'
        return 'has other values'

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of one tensor."""
    types = (tensor.dtype, *_NARROWER.get(tensor.dtype, ()))
    digests = {dtype_name(dtype): digest(tensor.to(dtype)) for dtype in types}
    return Fingerprint(dtype_name(tensor.dtype), tuple(tensor.shape), digests)


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
    """The fingerprints of tensors by name, without those that no output depends on."""
    return {name: fingerprint(tensor) for name, tensor in tensors.items() if is_compared(name)}


def is_compared(name: str) -> bool:
    """Whether a tensor of a state_dict is looked at when weights are compared."""
    return name.rpartition('.')[2] != _COUNTER


def digest(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor in logical order."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(values.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type: 'float32' and so on."""
    return str(dtype).removeprefix('torch.')
