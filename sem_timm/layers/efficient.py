"""Attentions whose queries meet a summary of keys and values instead of every key: linear in tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sem_timm.errors import OptionError
from sem_timm.layers.attention_core import AttentionCore, statistics_dtype
from sem_timm.layers.recording import traced_as_leaf


class EfficientAttention(AttentionCore):
    """Efficient attention as a core, https://arxiv.org/abs/1812.01243.

    Each query, normalised by a softmax over its channels, mixes d context vectors; each of these is an average of the
    values, weighted by a softmax over the tokens of one channel of the keys. Queries and keys are not scaled. Covered
    is the attention with softmax normalisation. Not covered are the variant that scales instead, and the reference
    module's own projections and residual connection, which the attention module around a core brings along.

    A core has no parameters here: ``num_heads``, ``head_axis``, ``device`` and ``dtype`` change nothing but what inputs
    are checked for.

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
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit or
            a mask is not the same for every query.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        leading = self.check_inputs(q, k, v)
        dtype = statistics_dtype(k.dtype)
        if attn_mask is not None:
            k = k + self.key_padding(attn_mask, (*leading, q.shape[-2], k.shape[-2]), dtype).transpose(-2, -1)
        context = k.softmax(-2, dtype=dtype).to(v.dtype).transpose(-2, -1) @ v
        return q.softmax(-1, dtype=dtype).to(q.dtype) @ context


class LinearAttention(AttentionCore):
    """Linear attention as a core, https://arxiv.org/abs/2007.14902.

    The first-order approximation of the exponential in softmax attention: the weight of key j for query i is
    ``1 + q_i . k_j``, both normalised to length one, so that sums over the keys are taken once for all queries. The
    mean weight of a query counts as 1e-6 at least, or as the smallest step of a narrower type. For images the tokens
    may come from a grid of any height and width. Covered is the attention mechanism. Not covered are the reference
    module's projections to an eighth of the channels and its residual connection with a learned scale.

    A core has no parameters here: ``num_heads``, ``head_axis``, ``device`` and ``dtype`` change nothing but what inputs
    are checked for.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and output; by default ``head_dim``.
        num_heads: Number of heads of the inputs, or 1 for any.
        head_axis: Which axis of q counts the heads, from the end.
        centre_keys: Whether the mean of the keys over the tokens is taken off them first. Softmax attention does not
            change by it, nor does `EfficientAttention`; here what all keys have in common no longer fills their
            directions. In a trained ViT-S whose maps of values were fitted in closed form, every layer missed its
            original by a little less with it (one seed, a twentieth of the error).
        device: Accepted for uniformity.
        dtype: Accepted for uniformity.

    Shape:
        - q: (..., N, d), k: (..., M, d), v: (..., M, value_dim).
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit or
            a mask is not the same for every query.
    """

    eps = 1e-6

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        centre_keys: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis, device=device, dtype=dtype)
        if not isinstance(centre_keys, bool):
            raise OptionError(f'centre_keys={centre_keys!r}: write centre_keys=True or centre_keys=False.')
        self.centre_keys = centre_keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        leading = self.check_inputs(q, k, v)
        dtype = statistics_dtype(k.dtype)
        root = _inverse_root(k, dtype)
        if attn_mask is None:
            k = (k - k.mean(-2, keepdim=True, dtype=dtype)).to(k.dtype) if self.centre_keys else k
            scale = root / _length(k, dtype)
            mean = v.mean(-2, keepdim=True, dtype=dtype)
        else:
            # What is added to a logit multiplies a weight.
            mask = self.key_padding(attn_mask, (*leading, q.shape[-2], k.shape[-2]), dtype)
            weight = mask.exp().transpose(-2, -1)
            weight = weight.expand(*weight.shape[:-2], k.shape[-2], 1)
            total = weight.sum(-2, keepdim=True).clamp(min=self.eps)
            k = (k - (k * weight).sum(-2, keepdim=True) / total).to(k.dtype) if self.centre_keys else k
            mean, root = (v * weight).sum(-2, keepdim=True) / total, total.rsqrt()
            scale = root * weight / _length(k, dtype)
        # Averages over the keys, in two steps of a root: a sum over many keys overflows in float16.
        context = (k.transpose(-2, -1) @ (v * scale).to(k.dtype)) * root
        key = (scale.transpose(-2, -1).to(k.dtype) @ k) * root + self.eps * root**2
        # Numerator and denominator are multiplied by the length of the query, which spares the division of all q.
        length = _length(q, dtype)
        product = q @ context.to(q.dtype)
        # A matrix of one row, not of one column: products with the latter are slow on a CPU.
        denominator = length + (key.to(q.dtype) @ q.transpose(-2, -1)).transpose(-2, -1)
        # Where all keys point away from the query, all weights are zero but for rounding.
        floor = max(self.eps, torch.finfo(product.dtype).eps)
        denominator = torch.maximum(denominator, floor * length)
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            # The same with gradients and without, in operations that converters of traces know. A program of
            # torch.export before torch 2.6 may not write over what a cast has returned.
            return ((product.to(dtype) + mean * length) / denominator).to(product.dtype)
        numerator = product.to(dtype).addcmul_(mean, length)
        out = numerator / denominator if numerator.requires_grad else numerator.div_(denominator)
        return out.to(product.dtype)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, centre_keys={self.centre_keys}' if self.centre_keys else super().extra_repr()


def _inverse_root(k: Tensor, dtype: torch.dtype) -> Tensor | float:
    """One over the root of the number of keys (..., M, d)."""
    count = k.shape[-2]
    if isinstance(count, int):
        return 1 / math.sqrt(max(count, 1))
    # In a trace or an exported program the number is computed from its input. Of arithmetic with Python's numbers the
    # exporters to ONNX know no root, or take down its result as it is for one input.
    return 1 / torch.scalar_tensor(count, dtype=dtype, device=k.device).clamp(min=1).sqrt()


def _length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The lengths of vectors along the last axis, (..., 1), all above zero."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp(min=1e-12)
