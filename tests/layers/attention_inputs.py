"""Inputs and states for the tests of attention cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from sem_timm.layers.attention_core import AttentionCore
from sem_timm.layers.attention_cores import attention_core_class, attention_core_names

AnyModule = TypeVar('AnyModule', bound=nn.Module)

NAMES = attention_core_names()
OPTIONS: dict[str, dict[str, Any]] = {
    'external': dict(memory=7),
    'halo': dict(block_size=3, halo_size=1, grid_size=(5, 4), num_prefix_tokens=1),
    'monarch': dict(passes=2, grid_size=(5, 4), num_prefix_tokens=1),
    'catt': dict(dictionary=9),
}
# PyTorch scripts the decompositions of its forward mode when that is first used, and warns of scripting.
in_forward_mode = pytest.mark.filterwarnings('ignore:.*torch.jit.script.*')

TOKENS = 21  # a grid of 5 by 4 and a class token


def trained(module: AnyModule) -> AnyModule:
    """The module with all parameters drawn anew, none of them zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return module


def build(name: str, head_dim: int = 6, value_dim: int | None = 5, num_heads: int = 1, **options: Any) -> AttentionCore:
    """A core of this name with parameters away from zero, in float64."""
    options = {'dtype': torch.float64, **OPTIONS.get(name, {}), **options}
    return trained(attention_core_class(name)(head_dim, value_dim, num_heads, **options))


def inputs(
    core: AttentionCore, *leading: int, queries: int, keys: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """What the core takes: (q, k, v), or q alone."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = draw(*leading, queries, core.head_dim)
    if not core.reads_keys:
        return (q,)
    count = queries if keys is None else keys
    return q, draw(*leading, count, core.head_dim), draw(*leading, count, core.value_dim)


def without_tokens(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Only the tokens for which a mask (N,) is True."""
    return tuple(x[..., mask, :] for x in tensors)


def both_modes(call: Callable[[], Tensor]) -> list[Tensor]:
    """The result with and without gradients, which are computed in different ways."""
    with torch.no_grad():
        plain = call()
    return [call().detach(), plain]


def close(actual: Any, expected: Any) -> None:
    """Equal to 1e-10."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
