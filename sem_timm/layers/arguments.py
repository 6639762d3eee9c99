"""What many layers are told in the same words, and the checks of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

from sem_timm.errors import OptionError

Init: TypeAlias = Literal['identity', 'paper']

INITS: tuple[Init, ...] = ('identity', 'paper')


def check_at_least_one(name: str, value: int) -> None:
    """Refuse a count that is not a whole number from 1 up.

    Raises:
        OptionError: If it is not.
    """
    _check_whole(name, value, 1)


def check_not_negative(name: str, value: int) -> None:
    """Refuse a count that is not a whole number from 0 up.

    Raises:
        OptionError: If it is not.
    """
    _check_whole(name, value, 0)


def check_channel_dim(channel_dim: int) -> None:
    """Refuse an axis of channels that is neither 1 nor -1.

    Raises:
        OptionError: If it is not.
    """
    if channel_dim not in (1, -1):
        raise OptionError(f'channel_dim={channel_dim!r}: write 1 for (B, C, ...) or -1 for (B, ..., C).')


def check_layout(channel_dim: int, num_prefix_tokens: int) -> None:
    """Refuse an axis of channels and a number of prefix tokens that no input has together.

    Raises:
        OptionError: If one is out of range, or inputs with channels in front are said to have prefix tokens.
    """
    check_channel_dim(channel_dim)
    check_not_negative('num_prefix_tokens', num_prefix_tokens)
    if num_prefix_tokens and channel_dim == 1:
        raise OptionError(
            f'num_prefix_tokens={num_prefix_tokens} with channel_dim=1: only (B, N, C) inputs have prefix tokens; '
            'add channel_dim=-1.'
        )


def _check_whole(name: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise OptionError(f'{name}={value!r}: {name} is a whole number, {lowest} or more.')
