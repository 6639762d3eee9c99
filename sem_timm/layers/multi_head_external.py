"""External attention with its projections, as a layer of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.compat import create_norm
from sem_timm.errors import OptionError
from sem_timm.layers.arguments import check_at_least_one
from sem_timm.layers.attention_core import key_padding, statistics_dtype
from sem_timm.layers.double_norm import normalize_twice
from sem_timm.layers.recording import refuse_script, traced_as_leaf
from sem_timm.plain import is_plain


class MultiHeadExternalAttention(nn.Module):
    """Multi-head external attention with its projections, the layer of EAMLP, https://arxiv.org/abs/2105.02358.

    The queries are four times as wide as the input and split into four times ``num_heads`` heads, which share one pair
    of memories, both with biases. All tokens take part, the class token too. It has the constructor and the forward of
    timm's attentions, for ``timm.create_model('vit_small_patch16_224', attn_layer=MultiHeadExternalAttention)``.

    Args:
        dim: Width C of the tokens.
        num_heads: Number by which ``dim`` is divided into the width of a head.
        qkv_bias: Whether the projection to the queries has a bias, as published.
        qk_norm: Whether the queries are normalised, per head, by ``norm_layer``; there are no keys.
        scale_norm: Whether ``norm_layer`` is applied before the last projection.
        proj_bias: Whether the last projection has a bias.
        attn_drop: Dropout of the attention.
        proj_drop: Dropout of the output.
        norm_layer: Class of the norms, needed with ``qk_norm`` or ``scale_norm``.
        memory: Number of slots.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Shape:
        - Input: (B, N, C).
        - Output: as the input.

    Raises:
        OptionError: If ``num_heads`` does not divide ``dim``, a number is out of range or ``norm_layer`` is missing;
            from ``forward`` for ``is_causal`` and for a mask that is not a key-padding mask (B, 1, 1, N).
    """

    expansion = 4
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        memory: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (('dim', dim), ('num_heads', num_heads), ('memory', memory)):
            check_at_least_one(name, value)
        if dim % num_heads:
            divisors = ', '.join(str(count) for count in range(1, dim + 1) if dim % count == 0)
            raise OptionError(f'num_heads={num_heads} does not divide dim={dim}. What does: {divisors}.')
        if (qk_norm or scale_norm) and norm_layer is None:
            raise OptionError('qk_norm and scale_norm need a norm_layer, such as norm_layer=timm.layers.LayerNorm.')
        wide = dim * self.expansion
        self.num_heads = num_heads * self.expansion
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, wide, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = create_norm(norm_layer, self.head_dim, device, dtype) if qk_norm and norm_layer else nn.Identity()
        self.mk = nn.Linear(self.head_dim, memory, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.mv = nn.Linear(memory, self.head_dim, device=device, dtype=dtype)
        self.norm = create_norm(norm_layer, wide, device, dtype) if scale_norm and norm_layer else nn.Identity()
        self.proj = nn.Linear(wide, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        if (node := traced_as_leaf(self, x, attn_mask, is_causal)) is not None:
            return node
        mask = self._token_mask(x, attn_mask, is_causal)
        if self._pays_to_fold(x):
            logits = self._folded_logits(x)
            attention = normalize_twice(logits, -3, -1, mask).to(logits.dtype)
            return self.proj_drop(self._folded_output(self.attn_drop(attention)))
        attention = self._attention(x, mask)
        return self.proj_drop(self.proj(self.norm(self.mv(self.attn_drop(attention)).flatten(-2))))

    def attention(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The share (B, N, heads, S) of each slot in what each token reads, for tokens (B, N, C)."""
        return self._attention(x, self._token_mask(x, attn_mask, is_causal))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # Heads stay behind the tokens, so that nothing is copied into another order.
        queries = self.q(x).view(*x.shape[:-1], self.num_heads, self.head_dim)
        logits = self.mk(self.q_norm(queries))
        if not torch.compiler.is_compiling() and not is_plain(self.mk, nn.Linear):
            logits = logits.clone()  # a hook may have kept what is overwritten next
        return normalize_twice(logits, -3, -1, mask).to(logits.dtype)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply all outputs by a number, in place in the last projection."""
        for parameter in self.proj.parameters():
            parameter.mul_(factor)

    def _pays_to_fold(self, x: Tensor) -> bool:
        """Whether products of neighbouring weights, each applied at once, cost less than one weight after another.

        That is so for more tokens than about the width. It is left alone while compiling or tracing, where a branch on
        the number of tokens would fix it, and where a layer is more than its weight.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.dim() != 3:
            return False
        if not all(is_plain(layer, nn.Linear) for layer in (self.q, self.mk, self.mv, self.proj)):
            return False
        if not is_plain(self.q_norm, nn.Identity) or not is_plain(self.norm, nn.Identity):
            return False
        tokens, dim, memory = x.shape[0] * x.shape[1], self.q.in_features, self.mk.out_features
        return dim * memory * (self.head_dim + tokens) < tokens * self.head_dim * (dim + memory)

    def _folded_logits(self, x: Tensor) -> Tensor:
        """Logits (B, N, heads, S) by the product of the projection to the queries and the memory of keys."""
        weight = self.mk.weight @ self.q.weight.unflatten(0, (self.num_heads, self.head_dim))
        bias = self.mk.bias.expand(self.num_heads, -1)
        if self.q.bias is not None:
            bias = bias + self.q.bias.unflatten(0, (self.num_heads, self.head_dim)) @ self.mk.weight.T
        return F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (self.num_heads, -1))

    def _folded_output(self, attention: Tensor) -> Tensor:
        """Outputs (B, N, C) by the product of the memory of values and the last projection."""
        weight = self.proj.weight.unflatten(1, (self.num_heads, self.head_dim)) @ self.mv.weight
        bias = self.proj.weight @ self.mv.bias.repeat(self.num_heads)
        bias = bias if self.proj.bias is None else bias + self.proj.bias
        return F.linear(attention.flatten(-2), weight.flatten(1), bias)

    def _token_mask(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """A mask (B, 1, 1, N) as numbers (B, N, 1, 1) to be added to logits (B, N, heads, S)."""
        if is_causal:
            raise OptionError(
                'MultiHeadExternalAttention cannot be causal: its softmax runs over all tokens at once. '
                'Pass is_causal=False.'
            )
        if attn_mask is None:
            return None
        scores = (x.shape[0], 1, x.shape[1], x.shape[1])
        return key_padding(attn_mask, scores, statistics_dtype(x.dtype), type(self).__name__).permute(0, 3, 1, 2)
