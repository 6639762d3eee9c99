"""torchvision's attention in shifted windows, without a decision that depends on the size of the map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def shifted_window_attention(
    input: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """The function of this name in ``torchvision.models.swin_transformer``, on maps (B, H, W, C).

    The map is padded to whole windows and shifted; with ``logit_scale`` attention is by cosines.
    """
    batch, height, width, channels = input.shape
    rows, columns = window_size
    x = F.pad(input, (0, 0, 0, -width % columns, 0, -height % rows))
    _, padded_height, padded_width, _ = x.shape
    down, across = padded_height // rows, padded_width // columns
    # A map of one window is not shifted along that axis.
    shifts = (shift_size[0] * (1 - 1 // down), shift_size[1] * (1 - 1 // across))
    is_shifted = any(shift_size)
    if is_shifted:
        x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
    x = x.reshape(batch, down, rows, across, columns, channels).transpose(2, 3)
    x = x.reshape(batch * down * across, rows * columns, channels)
    qkv = F.linear(x, qkv_weight, qkv_bias if logit_scale is None else _without_keys(qkv_bias, channels))
    qkv = qkv.reshape(batch * down * across, rows * columns, 3, num_heads, channels // num_heads)
    qkv = qkv.permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    if logit_scale is None:
        logits = (q * (channels // num_heads) ** -0.5) @ k.transpose(-2, -1)
    else:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    logits = logits + relative_position_bias
    if is_shifted:
        mask = mask_of_windows(padded_height, padded_width, window_size, shifts, x)
        logits = (logits.unflatten(0, (batch, down * across)) + mask).flatten(0, 1)
    weights = F.dropout(F.softmax(logits, dim=-1), attention_dropout, training)
    x = (weights @ v).transpose(1, 2).flatten(2)
    x = F.dropout(F.linear(x, proj_weight, proj_bias), dropout, training)
    x = x.reshape(batch, down, across, rows, columns, channels).transpose(2, 3)
    x = x.reshape(batch, padded_height, padded_width, channels)
    if is_shifted:
        x = torch.roll(x, shifts, (1, 2))
    return x[:, :height, :width].contiguous()


def _without_keys(bias: Tensor | None, channels: Any) -> Tensor | None:
    """A bias of queries, keys and values, without that of the keys."""
    if bias is None:
        return None
    queries, keys, values = bias[:channels], bias[channels : 2 * channels], bias[2 * channels :]
    return torch.cat((queries, torch.zeros_like(keys), values))


@fx.wrap
def mask_of_windows(height: int, width: int, window: Sequence[int], shifts: Sequence[int], like: Tensor) -> Tensor:
    """What keeps tokens of a window apart that were no neighbours before the shift, (1, windows, 1, N, N).

    Args:
        height: Height of the map, in whole windows.
        width: Its width.
        window: Height and width of a window.
        shifts: How far the map was shifted up and to the left.
        like: A tensor of the type and on the device of the mask.
    """
    # Along each axis there are those in front, and two parts of the last window.
    parts = []
    for size, extent, shift in zip((height, width), window, shifts):
        places = torch.arange(size, device=like.device)
        parts.append((places >= size - extent).long() + (places >= size - shift).long())
    regions = (3 * parts[0][:, None] + parts[1]).reshape(height // window[0], window[0], width // window[1], window[1])
    regions = regions.transpose(1, 2).flatten(2).flatten(0, 1)[:, None]
    return (regions != regions.transpose(1, 2)).to(like.dtype)[None, :, None] * -100.0
