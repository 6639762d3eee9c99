"""A core and, beside what it returns, parts of the values themselves, which a linear kernel loses the most of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sem_timm.errors import OptionError
from sem_timm.layers.attention_core import AttentionCore, statistics_dtype
from sem_timm.layers.block_grid import check_token_grid, required_grid
from sem_timm.layers.recording import traced_as_leaf

# The options that ask for terms beside the output of a core.
VALUE_OPTIONS = ('own', 'local')
OWN_TERMS = ('value', 'mean', 'first')
LOCAL_TERM = 'local'


class WithValues(AttentionCore):
    """A core plus linear maps, per head, of the values: of a token's own, of those around it, of what all share.

    ``core(q, k, v) A + v B + mean(v) C + v_first D + around(v) E + b``, with one set of maps for the image tokens and
    one for the prefix tokens. Softmax attention looks at a token itself, at its neighbours, at all tokens a little, and
    at the class token; cores that are linear in tokens are poor at the first two, which most of what they lose comes
    from. ``around`` is a depthwise 3 x 3 convolution on the grid, as in https://arxiv.org/abs/2308.00442 and others,
    which starts as the mean; prefix tokens have no neighbours.

    At first A is one and the other maps are zero, so that it returns what the core does. `sem_timm.transfer` fits the
    maps in closed form.

    Args:
        core: The core. Its keys need not be read; queries and values must be of the same tokens.
        own: Whether there are the terms of the token's own value, of the mean of all, and of the first token's where
            there are prefix tokens.
        local: Whether there is the term of the values around a token.
        grid_size: Height and width of the grid of image tokens, for ``local``. It serves inputs with as many tokens;
            any other number must be a square.
        num_prefix_tokens: Number of tokens before the grid.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        terms: Names of the terms, 'core' first.
        mix: The maps, (kinds, terms, heads, value_dim, value_dim): for image tokens, then for prefix tokens.
        bias: What is added to all, (kinds, heads, value_dim).
        around: The convolution, (heads * value_dim, 1, 3, 3); only with ``local``.

    Shape:
        - q: (..., N, d), k: (..., N, d), v: (..., N, value_dim).
        - Output: (..., N, value_dim).

    Raises:
        OptionError: From the constructor if an argument is out of range, from ``forward`` if an input does not fit or
            a mask is not the same for every query.
    """

    reads_keys: ClassVar[bool] = True

    def __init__(
        self,
        core: AttentionCore,
        own: bool = True,
        local: bool = False,
        grid_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(core.head_dim, core.value_dim, core.num_heads, core.head_axis)
        check_switches(own, local)
        self.core = core
        self.grid_size = check_token_grid(grid_size, num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        own_terms = (OWN_TERMS if num_prefix_tokens else OWN_TERMS[:2]) if own else ()
        self.terms = ('core', *own_terms, *((LOCAL_TERM,) if local else ()))
        kinds, heads, width = 1 + bool(num_prefix_tokens), self.num_heads, self.value_dim
        shape = (kinds, len(self.terms), heads, width, width)
        self.mix = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(kinds, heads, width, device=device, dtype=dtype))
        self.around = nn.Parameter(torch.empty(heads * width, 1, 3, 3, device=device, dtype=dtype)) if local else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the core's output through, and nothing beside it."""
        nn.init.zeros_(self.mix)
        self.mix[:, 0].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        nn.init.zeros_(self.bias)
        if self.around is not None:
            nn.init.constant_(self.around, 1 / 9)

    def grid(self, num_tokens: int) -> tuple[int, int]:
        """Height and width of the grid that so many tokens form, prefix tokens included.

        Raises:
            OptionError: If they form none.
        """
        return required_grid(num_tokens, self.grid_size, self.num_prefix_tokens, 'local=True')

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map queries (..., N, d) to outputs (..., N, value_dim)."""
        if (node := traced_as_leaf(self, q, k, v, attn_mask)) is not None:
            return node
        terms = self.inputs_of_maps(q, k, v, attn_mask)
        out = self._mapped(terms, 0)
        if prefix := self.num_prefix_tokens:
            first = self._mapped({name: term[..., :prefix, :] for name, term in terms.items()}, 1)
            out = torch.cat((first, out[..., prefix:, :]), -2)
        leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
        return self.heads_back(out, q.expand(*leading, -1, -1))

    def inputs_of_maps(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the maps are applied to, by the names of the terms: (heads, R, N, value_dim), or with an N of 1.

        Raises:
            OptionError: If queries and values are not of the same tokens, or a mask is not the same for every query.
        """
        leading = self.check_inputs(q, k, v)
        if q.shape[-2] != v.shape[-2]:
            raise OptionError(
                f'own=True and local=True got {q.shape[-2]} queries and {v.shape[-2]} values; they need a value for '
                'each query. Leave them out for this module.'
            )
        out = self.core(q, k, v, attn_mask) if self.core.reads_keys else self.core(q, attn_mask)
        values = v.expand(*leading, -1, -1)
        weights = None
        if attn_mask is not None:
            dtype = statistics_dtype(v.dtype)
            mask = self.key_padding(attn_mask, (*leading, q.shape[-2], v.shape[-2]), dtype)
            weights = mask.exp().transpose(-2, -1).expand(*leading, v.shape[-2], 1)
            weights = self.heads_first(weights).to(v.dtype)
        values = self.heads_first(values)
        kept = values if weights is None else values * weights
        found = {'core': self.heads_first(out.expand(*leading, -1, -1)), 'value': values}
        if 'mean' in self.terms:
            total = values.shape[-2] if weights is None else weights.sum(-2, keepdim=True).clamp(min=1e-6)
            found['mean'] = kept.sum(-2, keepdim=True) / total
        if 'first' in self.terms:
            found['first'] = values[..., :1, :]
        if self.around is not None:
            found[LOCAL_TERM] = self._around(kept)
        return {name: found[name] for name in self.terms}

    def _around(self, values: Tensor) -> Tensor:
        """The convolution of values (heads, R, N, value_dim), with zeros for prefix tokens."""
        assert self.around is not None
        heads, rows, tokens, width = values.shape
        height, breadth = self.grid(tokens)
        image = values[..., self.num_prefix_tokens :, :].permute(1, 0, 3, 2)
        image = image.reshape(rows, heads * width, height, breadth)
        image = F.conv2d(image, self.around.to(image.dtype), padding=1, groups=heads * width)
        image = image.view(rows, heads, width, height * breadth).permute(1, 0, 3, 2)
        return F.pad(image, (0, 0, self.num_prefix_tokens, 0))

    def _mapped(self, terms: dict[str, Tensor], kind: int) -> Tensor:
        """The sum of the mapped terms (heads, R, N, value_dim), by the maps of a kind of tokens."""
        total = self.bias[kind][:, None, None, :]
        for number, term in enumerate(terms.values()):
            rows = term.flatten(1, 2)
            total = total + torch.bmm(rows, self.mix[kind, number].to(rows.dtype)).view(*term.shape)
        return total

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, terms={self.terms}, num_prefix_tokens={self.num_prefix_tokens}'


def check_switches(own: bool, local: bool) -> None:
    """Raises OptionError unless the two options say yes or no."""
    for name, value in (('own', own), ('local', local)):
        if not isinstance(value, bool):
            raise OptionError(f'{name}={value!r}: write {name}=True or {name}=False.')
