"""A scale and a shift per channel, the adapter without a look at the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sem_timm.layers.arguments import check_at_least_one, check_channel_dim
from sem_timm.layers.recording import one_node, refuse_script


class ScaleAndShift(nn.Module):
    """One learned scale and one learned shift per channel, SSF, https://arxiv.org/abs/2210.08823.

    The scales start at 1 and the shifts at 0, so that the module returns its input bit for bit until it is trained. In
    contrast to a gate it does the same to every sample, and it can shift.

    Args:
        channels: Number of channels C.
        channel_dim: 1 for (B, C, *spatial), -1 for (B, *spatial, C).
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        scale: (C,).
        shift: (C,). Starts at the zero with a minus sign: added to it, the other zero and itself stay what they are.

    Shape:
        - Input: (B, C, *spatial) or (B, *spatial, C).
        - Output: as the input.

    Raises:
        OptionError: If ``channels`` is below 1 or ``channel_dim`` neither 1 nor -1.
    """

    can_be_identity = True
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        channels: int,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        check_channel_dim(channel_dim)
        self.channels = channels
        self.channel_dim = channel_dim
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scales at 1 and the shifts at 0."""
        self.scale.fill_(1.0)
        self.shift.fill_(-0.0)

    def become_identity(self) -> None:
        """Return the input bit for bit from now on, until it is trained."""
        self.reset_parameters()

    def state_beside_base(self) -> dict[str, Tensor] | None:
        """The state that weights of a base stand for, which have none for this: its own if it is an identity now."""
        is_identity = bool((self.scale == 1).all()) and not bool(self.shift.any())
        return self.state_dict() if is_identity else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift the channels of (B, C, *spatial) or (B, *spatial, C)."""
        return _scaled_and_shifted(x, self.scale, self.shift, self.channel_dim)

    def extra_repr(self) -> str:
        return f'{self.channels}, channel_dim={self.channel_dim}'


@one_node
def _scaled_and_shifted(x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int) -> Tensor:
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)  # float32 beside half precision under autocast
    if channel_dim == 1:
        for _ in range(x.ndim - 2):
            scale, shift = scale.unsqueeze(-1), shift.unsqueeze(-1)
    return x * scale + shift
