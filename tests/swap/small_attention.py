"""Small attention modules that timm has none of, and a model to put them into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class Model(nn.Module):
    """Patches of an image as tokens, a residual attention, a pooled output."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.attention = attention
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        return self.head((tokens + self.attention(tokens)).mean(1))


class Projected(nn.Module):
    """Queries, keys and values of one linear layer each, two heads, and a projection of what ``attend`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.35).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.proj(out.transpose(1, 2).flatten(2))


class Plain(Projected):
    """softmax(q kᵀ) v."""


class Causal(Projected):
    """A token sees those before it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Mixed(Projected):
    """Has a layer that mixes heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)


class MixedLogits(Mixed):
    """Logits of a head go into others."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mix(q @ k.mT).softmax(-1) @ v


class MixedWeights(Mixed):
    """Attention weights of a head go into others."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mix((q @ k.mT).softmax(-1)) @ v


class Einsum(Projected):
    """Products written with einsum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum('bhnm,bhmd->bhnd', torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1), v)


class Learned(Projected):
    """Queries are parameters, as many as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q = self.heads(self.q(self.latent)).expand(x.shape[0], -1, -1, -1)
        out = self.attend(q, self.heads(self.k(x)), self.heads(self.v(x)))
        return self.proj(out.transpose(1, 2).flatten(2))


class OverTheBatch(Projected):
    """Takes (B, N, C) for (N, B, C), so that images look at each other."""

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).permute(1, 2, 0, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.proj(out.permute(2, 0, 1, 3).flatten(2))


class TokensFirst(Projected):
    """Works on (N, B, C) inside, as ``nn.MultiheadAttention`` does, with heads folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        tokens, batch, _ = x.shape
        q, k, v = (layer(x).reshape(tokens, batch * 2, -1).transpose(0, 1) for layer in (self.q, self.k, self.v))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), v)
        return self.proj(out.transpose(0, 1).reshape(tokens, batch, -1)).transpose(0, 1)


class PairsFromTheInput(Projected):
    """Which pairs of tokens see each other depends on the tokens, and is given to an inner module as a mask."""

    class Inner(Projected):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
            return self.proj(out.transpose(1, 2).flatten(2))

    def __init__(self, pairwise: bool = True) -> None:
        nn.Module.__init__(self)
        self.inner = self.Inner()
        self.pairwise = pairwise

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(dim=-1)
        mask = norms[:, :, None] - norms[:, None, :] if self.pairwise else norms[:, None, :]
        return self.inner(x, attn_mask=mask.unsqueeze(1))
