"""Excitation operators: small modules that turn pooled features (B, C) into channel logits (B, C).

They share a contract: the constructor takes ``(channels, device=None, dtype=None)``, ``forward`` maps (B, C) to (B, C)
and applies no sigmoid, ``reset_parameters`` draws the published initial values, and ``zero_last_weights`` sets the last
weights at zero, so that the logits are exactly zero while those weights still receive a gradient.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sem_timm.layers.arguments import check_at_least_one
from sem_timm.layers.recording import is_recorded, one_node
from sem_timm.plain import is_plain


@runtime_checkable
class ZeroableExcitation(Protocol):
    """What an operator offers to take part in ``init='identity'``."""

    def zero_last_weights(self) -> None:
        """Set the last weights at zero in place, so that every logit is exactly zero."""


def eca_kernel_size(channels: int) -> int:
    """The odd kernel size of ECA for so many channels: 3 for 16 to 96, 5 for 128 to 1536, 7 for 2048."""
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


class SqueezeExcitation(nn.Module):
    """Two fully connected layers with a bottleneck, 'se', https://arxiv.org/abs/1709.01507.

    Args:
        channels: Number of channels C.
        reduction: Bottleneck ratio; the hidden width is ``max(channels // reduction, 4)``.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Raises:
        OptionError: If ``channels`` or ``reduction`` is below 1.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        check_at_least_one('reduction', reduction)
        hidden = max(channels // reduction, 4)
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw PyTorch's default initial values for both layers."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def zero_last_weights(self) -> None:
        """Set the second layer at zero."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        return self.fc2(self.fc1(pooled).relu())


class EfficientChannel(nn.Module):
    """One short convolution along the channels, 'eca', https://arxiv.org/abs/1910.03151.

    Its kernel size follows from the number of channels, see `eca_kernel_size`; the ends are padded with zeros.

    Args:
        channels: Number of channels C.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Raises:
        OptionError: If ``channels`` is below 1.
    """

    pads_with_zeros = True

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        kernel_size = eca_kernel_size(channels)
        padding = kernel_size // 2 if self.pads_with_zeros else 0
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=padding, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw PyTorch's default initial values."""
        self.conv.reset_parameters()

    def zero_last_weights(self) -> None:
        """Set the kernel at zero."""
        nn.init.zeros_(self.conv.weight)

    def convolve(self, rows: Tensor) -> Tensor:
        """Convolve every row of a matrix."""
        if self._as_one_image(rows):
            weight, padding = self.conv.weight.unsqueeze(2), (0, int(self.conv.padding[0]))
            return F.conv2d(rows.unsqueeze(0), weight, self.conv.bias, padding=padding).squeeze(0)
        return self.conv(rows.unsqueeze(1)).squeeze(1)

    def _as_one_image(self, rows: Tensor) -> bool:
        """Whether the batch becomes the height of one image: on a CPU five times as fast as sequences of one channel.

        But an image needs a height above zero, a compiled backward would hold for one height only, and who looks at
        the convolution or has changed it wants it called.
        """
        if isinstance(rows, fx.Proxy) or is_recorded() or (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return False
        return rows.shape[0] > 0 and is_plain(self.conv, nn.Conv1d)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        return self.convolve(pooled)


class CircularEfficientChannel(EfficientChannel):
    """ECA that takes the channels as a ring, 'ceca', after timm's ``CecaModule``; arguments as `EfficientChannel`."""

    pads_with_zeros = False

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        reach = self.conv.kernel_size[0] // 2
        return self.convolve(torch.cat((pooled[:, -reach:], pooled, pooled[:, :reach]), dim=1) if reach else pooled)


class EffectiveSqueezeExcitation(nn.Module):
    """One fully connected layer without a bottleneck, 'ese', https://arxiv.org/abs/1911.06667.

    As an operator it gives logits; the hard sigmoid of the publication gives way to the sigmoid of the gate.

    Args:
        channels: Number of channels C.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Raises:
        OptionError: If ``channels`` is below 1.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        self.fc = nn.Linear(channels, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw PyTorch's default initial values."""
        self.fc.reset_parameters()

    def zero_last_weights(self) -> None:
        """Set weight and bias at zero."""
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        return self.fc(pooled)


class InstanceEnhancement(nn.Module):
    """One scale and one offset per channel, 'ie', https://arxiv.org/abs/1908.04008.

    Args:
        channels: Number of channels C.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Raises:
        OptionError: If ``channels`` is below 1.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        self.gamma = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale at 0 and the offset at -1."""
        nn.init.zeros_(self.gamma)
        nn.init.constant_(self.beta, -1.0)

    def zero_last_weights(self) -> None:
        """Set scale and offset at zero."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        return pooled * self.gamma + self.beta if is_recorded() else torch.addcmul(self.beta, pooled, self.gamma)


class LinearContextTransform(nn.Module):
    """Group-normalised features with one scale and one offset per channel, 'lct', https://arxiv.org/abs/1909.03834.

    The number of groups is the largest divisor of C that is at most 16 and leaves at least 4 channels to a group: 4 for
    16 channels, 16 for 64 or more in common networks, and 1 where C is a prime or below 8.

    Args:
        channels: Number of channels C.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Raises:
        OptionError: If ``channels`` is below 1.
    """

    eps = 1e-5

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_groups(self) -> int:
        """Number of groups for the channels that there are; pruning may have left fewer."""
        return _num_groups(_length(self.weight))

    def reset_parameters(self) -> None:
        """Set the scale at 0 and the offset at 1."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def zero_last_weights(self) -> None:
        """Set scale and offset at zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (B, C) to logits (B, C)."""
        return _normalized_in_groups(pooled, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f'num_groups={self.num_groups}'


@one_node
def _normalized_in_groups(pooled: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # Not nn.functional.group_norm: it refuses a single sample with a single channel per group.
    return torch.group_norm(pooled, _num_groups(_length(weight)), weight, bias, eps)


def _length(weight: Tensor) -> int:
    """The length of a vector, which is a number for good in a trace by `torch.jit`, as the vector itself is."""
    if not torch.jit.is_tracing():
        return weight.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return int(weight.shape[0])


@functools.cache
def _num_groups(channels: int) -> int:
    most = max(1, min(16, channels // 4))
    return next(count for count in range(most, 0, -1) if channels % count == 0)
