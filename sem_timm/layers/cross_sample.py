"""In-sample attention beside attention to a dictionary shared by all samples (CATT)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.errors import OptionError, check_choice
from sem_timm.layers.arguments import INITS, Init, check_at_least_one
from sem_timm.layers.attention_core import AttentionCore, statistics_dtype
from sem_timm.layers.k_means import cluster_means, k_means, nearest
from sem_timm.layers.recording import traced_as_leaf


class CrossSampleAttention(AttentionCore):
    """CATT, causal attention as in cause and effect, as a core, https://arxiv.org/abs/2103.03493.

    In-sample attention is softmax attention to the keys and values given; cross-sample attention is softmax attention
    of the same queries to a learned dictionary that all samples share; a linear layer fuses both. The dictionary is
    kept as its keys and its values, the two projections that the published form computes from one table.

    Covered are both attentions, the fusion and the dictionary made by k-means over features (`init_dictionary`). Not
    covered are the separate query projections of the two attentions, since a core is given one set of queries, and the
    published schedules. Time and memory are quadratic in tokens, as in softmax attention.

    Args:
        head_dim: Width d of queries and keys.
        value_dim: Width of values and output; by default ``head_dim``.
        num_heads: Number of heads with dictionaries and fusions of their own; with 1 all heads share them.
        head_axis: Which axis of q counts the heads, from the end.
        dictionary: Number of entries.
        init: 'identity' for a fusion that starts as in-sample attention alone: plain softmax attention, without the
            position biases that the replaced attention may have had. 'paper' for the published dictionary, uniform in
            [0, 0.01), with a fusion of PyTorch's default initial values.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        dictionary_key: (entries, d), or (heads, entries, d).
        dictionary_value: (entries, value_dim), or (heads, entries, value_dim).
        fusion_weight: From both attentions, one after the other, to the output: (2 value_dim, value_dim), or with
            heads in front.
        fusion_bias: (1, value_dim), or (heads, 1, value_dim).

    Shape:
        - q: (..., N, d), k: (..., M, d), v: (..., M, value_dim).
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit.
    """

    takes_pairwise_mask: ClassVar[bool] = True

    def __init__(
        self,
        head_dim: int,
        value_dim: int | None = None,
        num_heads: int = 1,
        head_axis: int = -3,
        *,
        dictionary: int = 512,
        init: Init = 'identity',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, value_dim, num_heads, head_axis)
        check_at_least_one('dictionary', dictionary)
        check_choice('init', init, INITS)
        self.dictionary = dictionary
        self.init = init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.parameter_shape(*shape), device=device, dtype=dtype))

        self.dictionary_key = parameter(dictionary, head_dim)
        self.dictionary_value = parameter(dictionary, self.value_dim)
        self.fusion_weight = parameter(2 * self.value_dim, self.value_dim)
        self.fusion_bias = parameter(1, self.value_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as ``init`` says."""
        if self.init == 'identity':
            nn.init.normal_(self.dictionary_key)
            nn.init.normal_(self.dictionary_value)
            nn.init.zeros_(self.fusion_bias)
            nn.init.zeros_(self.fusion_weight)
            self.fusion_weight.diagonal(dim1=-2, dim2=-1).fill_(1)
            return
        nn.init.uniform_(self.dictionary_key, 0, 0.01)
        nn.init.uniform_(self.dictionary_value, 0, 0.01)
        bound = (2 * self.value_dim) ** -0.5
        nn.init.uniform_(self.fusion_weight, -bound, bound)
        nn.init.uniform_(self.fusion_bias, -bound, bound)

    @torch.no_grad()
    def init_dictionary(
        self, keys: Tensor, values: Tensor | None = None, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Make the dictionary from features by k-means, in place, as published.

        Its keys become the centres of clusters of ``keys``, its values the means of ``values`` in the same clusters.

        Args:
            keys: (..., M, d), such as the k that the core is called with; as many vectors per dictionary as it has
                entries, or more.
            values: (..., M, value_dim), one to each key; by default the keys, if they are as wide as values.
            iterations: Number of times that centres are moved to the mean of their cluster.
            generator: Source of the choice of the first centres.

        Raises:
            OptionError: If there are too few vectors, or widths do not fit.
        """
        check_at_least_one('iterations', iterations)
        self.check_query(keys)
        values = keys if values is None else values
        if values.shape != (*keys.shape[:-1], self.value_dim):
            raise OptionError(
                f'init_dictionary got keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}; '
                f'value_dim is {self.value_dim}. Pass values=... with one vector of that width to each key.'
            )
        dtype = statistics_dtype(keys.dtype)
        centers, means = [], []
        for points, attached in zip(self.heads_first(keys.to(dtype)), self.heads_first(values.to(dtype))):
            points, attached = points.flatten(0, 1), attached.flatten(0, 1)
            centers.append(k_means(points, self.dictionary, iterations, generator))
            # A cluster that nothing belongs to stands for nothing in particular.
            empty = attached.mean(0).expand(self.dictionary, -1)
            means.append(cluster_means(attached, nearest(points, centers[-1]), empty))
        self.dictionary_key.copy_(torch.stack(centers).view_as(self.dictionary_key))
        self.dictionary_value.copy_(torch.stack(means).view_as(self.dictionary_value))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        self.check_inputs(q, k, v)
        in_sample = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        key, value = (
            self.spread_heads(entries).expand(*q.shape[:-2], -1, -1)
            for entries in (self.dictionary_key, self.dictionary_value)
        )
        cross_sample = F.scaled_dot_product_attention(q, key, value)
        first, second = self.spread_heads(self.fusion_weight).split(self.value_dim, dim=-2)
        return in_sample @ first + cross_sample @ second + self.spread_heads(self.fusion_bias).to(in_sample.dtype)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, dictionary={self.dictionary}, init={self.init!r}'
