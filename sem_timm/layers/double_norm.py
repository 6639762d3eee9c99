"""The double normalisation of external attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sem_timm.layers.attention_core import statistics_dtype
from sem_timm.layers.recording import may_write_in_place

L1_EPS = 1e-9
LOG2_E = math.log2(math.e)


def normalize_twice(logits: Tensor, token_dim: int, slot_dim: int, attn_mask: Tensor | None = None) -> Tensor:
    """Softmax over the tokens, then L1 norm over the memory slots.

    Args:
        logits: One for each token and slot. Overwritten where neither gradients nor transforms need them.
        token_dim: Axis of the tokens.
        slot_dim: Axis of the slots.
        attn_mask: Numbers that are added to the logits.

    Returns:
        The attention, of the shape of the logits, and in float32 where they are narrower.
    """
    dtype = statistics_dtype(logits.dtype)
    if attn_mask is not None:
        logits = logits.to(dtype) + attn_mask
    if not may_write_in_place(logits) or logits.requires_grad or logits.dtype != dtype or logits.numel() == 0:
        attention = logits.softmax(token_dim, dtype=dtype)
        # Not a division: its backward takes twice as many passes.
        return attention * (attention.sum(slot_dim, keepdim=True) + L1_EPS).reciprocal()
    # On a CPU every new result of this size costs more than its arithmetic, and exp2 is several times as fast as exp.
    largest = logits.amax(token_dim, keepdim=True)
    torch.add(largest.mul_(-LOG2_E), logits, alpha=LOG2_E, out=logits)
    logits.exp2_()
    logits.div_(logits.sum(token_dim, keepdim=True))
    return logits.div_(logits.sum(slot_dim, keepdim=True).add_(L1_EPS))
