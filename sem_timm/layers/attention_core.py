"""What all attention cores share: their shapes, their parameters per head, and which masks they can apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.layers.recording import refuse_script

# As low as an additive mask needs to be: its exponential is zero in every type, and unlike minus infinity it leaves a
# softmax finite when all entries have it. Twice the number still fits into float16.
LOWEST = -3e4


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums and softmaxes over tokens are computed in: float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def key_padding(attn_mask: Tensor, scores_shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
    """A mask that is the same for every query, as numbers to be added to logits.

    Args:
        attn_mask: By the convention of ``scaled_dot_product_attention``: True takes part, or numbers to be added.
        scores_shape: What it must broadcast to, (..., N, M) for N queries and M keys.
        dtype: Type of the result.
        name: Who asks, for the message.

    Returns:
        (..., 1, M) or (..., 1, 1), with as many axes as ``scores_shape`` and no number below ``LOWEST``.

    Raises:
        OptionError: If the mask differs between queries, or does not broadcast.
    """
    mask = torch.atleast_2d(attn_mask)
    if mask.shape[-2] != 1:
        raise OptionError(
            f'{name} got an attention mask of shape {tuple(attn_mask.shape)}: it never forms the pairs of queries and '
            'keys that such a mask would switch off.\n'
            '  Pass a key-padding mask, the same for every query, of shape (B, 1, 1, N).'
        )
    mask = mask[(None,) * (len(scores_shape) - mask.dim())]
    if mask.dim() != len(scores_shape) or any(m not in (1, s) for m, s in zip(mask.shape, scores_shape)):
        raise OptionError(
            f'{name} got an attention mask of shape {tuple(attn_mask.shape)}, which does not broadcast to '
            f'{tuple(scores_shape)}; a key-padding mask has the shape (B, 1, 1, N).'
        )
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, LOWEST)
    return mask.to(dtype).clamp(min=LOWEST)


def with_axis_moved(x: Tensor, source: int, destination: int) -> Tensor:
    """A tensor with one axis in another place, as by ``movedim``.

    Written as a permutation of axes that are counted from the front: the older exporter to ONNX reads ``movedim`` of
    others from memory that is not its own.
    """
    order = list(range(x.dim()))
    order.insert(destination % x.dim(), order.pop(source % x.dim()))
    return x.permute(order)


class AttentionCore(nn.Module):
    """Base of what stands between the query, key and value projections of an attention module and its output.

    ``forward(q, k, v, attn_mask=None)`` takes the place of ``scaled_dot_product_attention``; where ``reads_keys`` is
    False it is ``forward(q, attn_mask=None)``. Masks follow that function's convention. A core that never forms all
    pairs of tokens (``takes_pairwise_mask`` is False) honours only masks that are the same for every query, such as
    (B, 1, 1, N), and refuses others.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and outputs; by default ``head_dim``.
        num_heads: Number of heads with parameters of their own. With 1 all heads share them, there need be no axis of
            heads, and heads may also be folded into the batch.
        head_axis: Which axis of q counts the heads, from the end: -3 for (B, heads, N, d), -4 for
            (B, heads, windows, N, d).
        device: Where parameters are created, in cores that have any.
        dtype: Type of the parameters.

    Shape:
        - q: (..., N, d), k: (..., M, d), v: (..., M, value_dim), with leading axes that broadcast.
        - Output: (..., N, value_dim), with the leading axes that all have in common.

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit.
    """

    reads_keys: ClassVar[bool] = True
    takes_pairwise_mask: ClassVar[bool] = False
    # What a trained model kept of its skill without training, in a sentence; empty for a core that needs training.
    fidelity: ClassVar[str] = ''
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (('head_dim', head_dim), ('value_dim', value_dim), ('num_heads', num_heads)):
            check_at_least_one(name, value)
        if isinstance(head_axis, bool) or not isinstance(head_axis, int) or head_axis > -3:
            raise OptionError(
                f'head_axis={head_axis!r}: count from the end, before tokens and channels: -3 for (B, heads, N, d).'
            )
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.head_axis = head_axis

    def check_query(self, q: Tensor) -> None:
        """Refuse a q of another width or another number of heads.

        Raises:
            OptionError: If it has.
        """
        if q.dim() < 2 or q.shape[-1] != self.head_dim:
            raise OptionError(
                f'{type(self).__name__} got a q of shape {tuple(q.shape)}; '
                f'it was built with head_dim={self.head_dim} and needs (..., N, {self.head_dim}).'
            )
        if self.num_heads > 1 and (q.dim() < -self.head_axis or q.shape[self.head_axis] != self.num_heads):
            raise OptionError(
                f'{type(self).__name__} got a q of shape {tuple(q.shape)}; it was built with '
                f'num_heads={self.num_heads} on axis {self.head_axis}. '
                'Give the number of heads there is, or num_heads=1 for parameters that all heads share.'
            )

    def check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> torch.Size:
        """Refuse inputs whose widths, numbers of tokens or leading axes do not fit.

        Returns:
            The leading axes that all three broadcast to, those of the output.

        Raises:
            OptionError: If they do not fit.
        """
        self.check_query(q)
        flat = k.dim() < 2 or v.dim() < 2
        if flat or k.shape[-1] != self.head_dim or v.shape[-1] != self.value_dim or k.shape[-2] != v.shape[-2]:
            raise OptionError(
                f'{type(self).__name__} got k of shape {tuple(k.shape)} and v of shape {tuple(v.shape)}; it was built '
                f'with head_dim={self.head_dim}, value_dim={self.value_dim} and needs (..., M, {self.head_dim}) and '
                f'(..., M, {self.value_dim}).'
            )
        leading = [x.shape[:-2] for x in (q, k, v)]
        if leading[0] == leading[1] == leading[2]:
            return leading[0]
        try:
            return torch.broadcast_shapes(*leading)
        except RuntimeError as error:
            raise OptionError(
                f'{type(self).__name__} got q of shape {tuple(q.shape)}, k of shape {tuple(k.shape)} and v of shape '
                f'{tuple(v.shape)}, whose leading axes do not broadcast.\n'
                '  Give all three the same leading axes, such as (B, heads), or 1 where one serves all.'
            ) from error

    def key_padding(self, attn_mask: Tensor, scores_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A mask as numbers (..., 1, M) to be added to logits of shape (..., N, M); see the function of this name."""
        return key_padding(attn_mask, scores_shape, dtype, type(self).__name__)

    def heads_first(self, x: Tensor) -> Tensor:
        """(..., N, d) as (heads, R, N, d), where heads is 1 unless they have parameters of their own."""
        x = with_axis_moved(x, self.head_axis, 0) if self.num_heads > 1 else x.unsqueeze(0)
        return x.reshape(x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])

    def heads_back(self, x: Tensor, like: Tensor) -> Tensor:
        """(heads, R, N, width) with the leading axes of another tensor, the inverse of `heads_first`."""
        if self.num_heads == 1:
            return x.reshape(*like.shape[:-2], *x.shape[-2:])
        leading = with_axis_moved(like, self.head_axis, 0).shape[1:-2]
        return with_axis_moved(x.reshape(x.shape[0], *leading, *x.shape[-2:]), 0, self.head_axis)

    def parameter_shape(self, *shape: int) -> tuple[int, ...]:
        """The shape of a parameter, with an axis of heads in front where heads have their own."""
        return (self.num_heads, *shape) if self.num_heads > 1 else shape

    def spread_heads(self, parameter: Tensor) -> Tensor:
        """A matrix per head as something that broadcasts along the head axis of inputs."""
        if self.num_heads == 1:
            return parameter
        return parameter.reshape(self.num_heads, *(1,) * (-self.head_axis - 3), *parameter.shape[1:])

    def extra_repr(self) -> str:
        text = f'{self.head_dim}, value_dim={self.value_dim}'
        return text if self.num_heads == 1 else f'{text}, num_heads={self.num_heads}, head_axis={self.head_axis}'
