"""timm's own channel attentions for every layout: they expect (B, C, H, W), other models hand on (B, ..., C)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from timm.layers.create_attn import get_attn
from torch import Tensor, nn

from sem_timm.compat import create_attn
from sem_timm.errors import OptionError, closest
from sem_timm.layers.arguments import check_layout, check_not_negative
from sem_timm.layers.recording import one_node

# Names of timm's create_attn whose module, built for 64 channels, returns an input of (2, 64, 16, 16) in its own shape.
# The others of timm 1.0.31: 'bottleneck' must know the feature size when it is built, and 'bat' asserts that height and
# width are multiples of 7. 'halo' is kept, but asserts at run time that they are multiples of its block size, 8.
_TIMM_ATTENTION_NAMES = (
    'se',
    'ese',
    'eca',
    'ecam',
    'ceca',
    'ge',
    'gc',
    'gca',
    'cbam',
    'lcbam',
    'coord',
    'scoord',
    'ela',
    'strip',
    'sk',
    'splat',
    'lambda',
    'halo',
    'nl',
)

# What an operation's name has in front of timm's: without it, a name is never timm's, so that none has two meanings.
TIMM_PREFIX = 'timm_'

# GatherExcite of timm 1.0.31 hands its MLP one argument twice and raises TypeError; it builds without the MLP.
_NEEDED_OPTIONS: dict[str, dict[str, Any]] = {'ge': {'use_mlp': False}}


def timm_attention_names() -> tuple[str, ...]:
    """The names of timm's ``create_attn`` that keep the shape of their input; those that this timm has."""
    return tuple(name for name in _TIMM_ATTENTION_NAMES if _is_known(name))


@cache
def _is_known(name: str) -> bool:
    try:
        get_attn(name)
    except AssertionError:  # what older timm says of 'coord' and those that came with it
        return False
    return True


def timm_attention(
    name: str,
    channels: int,
    *,
    channel_dim: int = 1,
    num_prefix_tokens: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build one of timm's attention modules for a layout.

    None of them starts as an identity.

    Args:
        name: One of `timm_attention_names`.
        channels: Number of channels C.
        channel_dim: 1 for (B, C, H, W), -1 for (B, H, W, C) and (B, N, C).
        num_prefix_tokens: For (B, N, C) inputs, how many leading tokens pass untouched.
        device: Where the parameters are created.
        dtype: Type of the parameters.
        **options: Handed to timm's class.

    Raises:
        OptionError: If the name or the layout is unknown.
    """
    if name not in timm_attention_names():
        raise OptionError(f'timm attention {name!r} is unknown or unfit. {closest(name, timm_attention_names())}')
    check_layout(channel_dim, num_prefix_tokens)
    options = {**_NEEDED_OPTIONS.get(name, {}), **options}
    module = create_attn(name, channels, device=device, dtype=dtype, **options)
    return module if channel_dim == 1 else ChannelsFirst(module, num_prefix_tokens)


class ChannelsFirst(nn.Module):
    """Runs a module made for (B, C, H, W) on inputs that have their channels last.

    Tokens are laid out as a square where their number is one, else as one column. The prefix tokens, such as the class
    token, have no place in it and pass untouched.

    Args:
        module: A module that maps (B, C, H, W) to the same shape.
        num_prefix_tokens: For (B, N, C) inputs, how many leading tokens pass untouched.

    Shape:
        - Input: (B, H, W, C), or (B, N, C).
        - Output: as the input.

    Raises:
        OptionError: If ``num_prefix_tokens`` is negative, or the input has neither shape.
    """

    def __init__(self, module: nn.Module, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        check_not_negative('num_prefix_tokens', num_prefix_tokens)
        self.module = module
        self.num_prefix_tokens = num_prefix_tokens

    def state_beside_base(self) -> dict[str, Tensor] | None:
        """The state that weights of a base stand for, which have none for this: what the module says."""
        of_module = getattr(self.module, 'state_beside_base', None)
        state = None if of_module is None else of_module()
        return None if state is None else {f'module.{key}': tensor for key, tensor in state.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module to (B, H, W, C) or (B, N, C)."""
        maps = self.module(_as_maps(x, self.num_prefix_tokens))
        return _as_before(maps, x, self.num_prefix_tokens)

    def extra_repr(self) -> str:
        return f'num_prefix_tokens={self.num_prefix_tokens}' if self.num_prefix_tokens else ''


@one_node
def _as_maps(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, H, W, C), or the tokens of (B, N, C) laid out as a grid, as (B, C, H, W)."""
    if x.ndim == 4 and not num_prefix_tokens:
        return x.permute(0, 3, 1, 2)
    if x.ndim != 3 or x.shape[1] <= num_prefix_tokens:
        raise OptionError(
            f'ChannelsFirst with num_prefix_tokens={num_prefix_tokens} got an input of shape {tuple(x.shape)}; it '
            f'needs (B, N, C) with N above {num_prefix_tokens}' + ('.' if num_prefix_tokens else ', or (B, H, W, C).')
        )
    tokens = x[:, num_prefix_tokens:]
    count = tokens.shape[1]
    side = math.isqrt(count)
    height, width = (side, side) if side * side == count else (count, 1)
    return tokens.transpose(1, 2).unflatten(2, (height, width))


@one_node
def _as_before(maps: Tensor, x: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, C, H, W) in the layout of an input, with its prefix tokens in front."""
    if x.ndim == 4:
        return maps.permute(0, 2, 3, 1)
    tokens = maps.flatten(2).transpose(1, 2)
    return torch.cat((x[:, :num_prefix_tokens], tokens), dim=1) if num_prefix_tokens else tokens
