"""The block of external attention for feature maps, as used for segmentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError, check_choice
from sem_timm.layers.arguments import INITS, Init, check_at_least_one
from sem_timm.layers.double_norm import normalize_twice
from sem_timm.layers.recording import refuse_script, traced_as_leaf


class ExternalAttention2d(nn.Module):
    """External attention over the positions of a feature map, https://arxiv.org/abs/2105.02358.

    A 1x1 convolution, one head of external attention as wide as the input, a 1x1 convolution with batch norm, and the
    input added. With ``init='identity'`` the batch norm starts at zero and no activation follows the sum, so the block
    returns its input bit for bit until it is trained, and the batch norm learns from the first step on.
    ``init='paper'`` starts the batch norm at one and ends in a ReLU, as published.

    Args:
        channels: Number of channels C.
        memory: Number of slots S.
        init: 'identity' for an exact identity, 'paper' for the published block.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        mk: Memory of keys, (C, S).
        mv: Memory of values, (S, C). Starts as a copy of the memory of keys and is trained apart from it.

    Shape:
        - Input: (B, C, H, W).
        - Output: as the input.

    Raises:
        OptionError: If an argument is out of range, or the input has another number of axes or channels.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        channels: int,
        memory: int = 64,
        init: Init = 'identity',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        check_at_least_one('memory', memory)
        check_choice('init', init, INITS)
        self.channels = channels
        self.memory = memory
        self.init = init
        self.conv1 = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.mk = nn.Parameter(torch.empty(channels, memory, device=device, dtype=dtype))
        self.mv = nn.Parameter(torch.empty(memory, channels, device=device, dtype=dtype))
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.activation = nn.ReLU() if init == 'paper' else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the published initial values; only the batch norm depends on ``init``."""
        self.conv1.reset_parameters()
        self.norm.reset_parameters()
        for weight in (self.conv1.weight, self.conv2.weight, self.mk):
            nn.init.normal_(weight, std=math.sqrt(2 / self.channels))
        self.mv.copy_(self.mk.T)
        if self.init == 'identity':
            nn.init.zeros_(self.norm.weight)

    def state_beside_base(self) -> dict[str, Tensor] | None:
        """The state that weights of a base stand for, which have none for this: its own if it is an identity now."""
        last = (self.norm.weight, self.norm.bias)
        return None if self.init == 'paper' or any(bool(p.any()) for p in last) else self.state_dict()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if (node := traced_as_leaf(self, x)) is not None:
            return node
        attention = self._attention(x)
        out = torch.bmm(self.mv.transpose(0, 1).expand(x.shape[0], -1, -1), attention).view(x.shape)
        return self.activation(x + self.norm(self.conv2(out)))

    def attention(self, x: Tensor) -> Tensor:
        """The share (B, S, H, W) of each slot in what each position reads, for an input (B, C, H, W)."""
        return self._attention(x).view(x.shape[0], self.memory, *x.shape[2:])

    def _attention(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise OptionError(
                f'ExternalAttention2d with channels={self.channels} got an input of shape {tuple(x.shape)}; '
                f'it needs (B, {self.channels}, H, W).'
            )
        q = self.conv1(x).flatten(2)
        logits = torch.bmm(self.mk.transpose(0, 1).expand(q.shape[0], -1, -1), q)
        return normalize_twice(logits, -1, -2).to(logits.dtype)

    def extra_repr(self) -> str:
        return f'{self.channels}, memory={self.memory}, init={self.init!r}'
