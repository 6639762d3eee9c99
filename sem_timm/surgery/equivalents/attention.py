"""torch's own multi-head attention and encoder layer, as their documentation has them and without shortcuts.

What they compute in inference, in one call, is equal up to rounding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sem_timm.errors import TraceError


def multi_head_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """`torch.nn.MultiheadAttention.forward` of a batch; ``is_causal`` is a hint that says no more than the mask."""
    if need_weights:
        raise TraceError('it returns its attention weights, which no other core has: call it with need_weights=False')
    if self.bias_k is not None or self.add_zero_attn:
        raise TraceError('it attends to keys that are no tokens, for add_bias_kv or add_zero_attn')
    alike = query is key and key is value
    if not self.batch_first:
        query = query.transpose(0, 1)
        key, value = (query, query) if alike else (key.transpose(0, 1), value.transpose(0, 1))
    if alike and self.in_proj_weight is not None:
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        projected = [packed[0], packed[1], packed[2]]
    else:
        own = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        rows = own if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = [F.linear(x, rows[i], biases[i]) for i, x in enumerate((query, key, value))]
    q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
    logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:  # (N, M), or one for each head of each sample
        pairs = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
        logits = _masked(logits, pairs)
    if key_padding_mask is not None:
        logits = _masked(logits, key_padding_mask[:, None, None, :])
    weights = F.dropout(F.softmax(logits, dim=-1), self.dropout, self.training)
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
    return out if self.batch_first else out.transpose(0, 1), None


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    # By torch's convention for this layer, True switches a pair off.
    return logits + mask if mask.is_floating_point() else logits.masked_fill(mask, float('-inf'))


def encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`torch.nn.TransformerEncoderLayer.forward`."""
    masks = {'attn_mask': src_mask, 'key_padding_mask': src_key_padding_mask}
    for name, mask in masks.items():
        if mask is not None:
            masks[name] = F._canonical_mask(mask, name, None, '', src.dtype, check_other=False)
    x = src
    if self.norm_first:
        x = x + self._sa_block(self.norm1(x), *masks.values(), is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(x + self._sa_block(x, *masks.values(), is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))
