"""The block of CaaM, attention with a complement, and the penalty it is trained with.

Its paper calls it causal attention, as in cause and effect; nothing here is autoregressive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sem_timm.errors import OptionError
from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.recording import traced_as_leaf


class CaaMAttention(AttentionCore):
    """The block of CaaM, causal attention as in cause and effect, as a core, https://arxiv.org/abs/2108.08782.

    Nothing here is autoregressive: queries see the keys after them, too. One branch attends to what the queries
    resemble, ``c = softmax(Q K^T / sqrt(d)) V``; its complement attends to what they resemble least,
    ``s = softmax(-Q K^T / sqrt(d)) V``, with the same projections. The result is their mix, ``c + s``, as published:
    a sum, not a mean. Where queries tell keys hardly apart, both branches are near the mean of the values, and the
    output is near twice that of one attention, with four times its variance.

    Covered are the block of the transformer form, with both branches for the heads that tell them apart (`branches`),
    and `invariance_penalty`. Not covered is the training that gives the branches their meaning: the split of the data
    into environments that is learned against the model, one classifier per environment, and the convolutional form
    with a CBAM gate. Without that training the block is two attentions of opposite sign.

    It has no parameters: ``num_heads``, ``head_axis``, ``device`` and ``dtype`` change nothing but what inputs are
    checked for. Numbers in a mask are added to the logits of both branches, after the change of sign.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and output; by default ``head_dim``.
        num_heads: Number of heads of the inputs, or 1 for any.
        head_axis: Which axis of q counts the heads, from the end.
        device: Accepted for uniformity.
        dtype: Accepted for uniformity.

    Shape:
        - q: (..., N, d), k: (..., M, d), v: (..., M, value_dim).
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit.
    """

    takes_pairwise_mask: ClassVar[bool] = True

    def branches(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The branch of what queries resemble and its complement, (..., N, value_dim) each."""
        self.check_inputs(q, k, v)
        alike = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return alike, F.scaled_dot_product_attention(-q, k, v, attn_mask=attn_mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        alike, complement = self.branches(q, k, v, attn_mask)
        return alike + complement


def invariance_penalty(weights: Sequence[Tensor] | Tensor) -> Tensor:
    """How much classifiers trained in different environments disagree, ``mean_e(|W_e - W_mean|^2 / |W_e|_1^2)``.

    The invariance loss of CaaM, causal attention as in cause and effect, https://arxiv.org/abs/2108.08782.

    Args:
        weights: The weight of each environment's classifier, all of one shape; or one tensor of them along its first
            axis.

    Returns:
        One number, zero where all weights are equal. A weight that is all zero counts as one of norm 1e-12.

    Raises:
        OptionError: If there is no weight, or the shapes differ.
    """
    shapes = [tuple(weight.shape) for weight in weights]
    if not shapes or len(set(shapes)) > 1:
        raise OptionError(
            f'invariance_penalty got weights of the shapes {shapes}; '
            'it needs one weight per environment, one or more, all of one shape.'
        )
    stacked = (weights if isinstance(weights, Tensor) else torch.stack(tuple(weights))).flatten(1)
    deviation = (stacked - stacked.mean(0)).square().sum(1)
    return (deviation / stacked.abs().sum(1).clamp(min=1e-12).square()).mean()
