"""The Switchable Excitation Module, and the single systems it is made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError, check_choice
from sem_timm.layers.arguments import Init
from sem_timm.layers.gate import ChannelGate
from sem_timm.layers.operators import ExcitationClass
from sem_timm.layers.recording import is_eager, is_recorded, may_write_over, one_node

DecisionForm: TypeAlias = Literal['sigmoid', 'softmax', 'equal']

DECISION_FORMS: tuple[DecisionForm, ...] = ('sigmoid', 'softmax', 'equal')


class SEM(ChannelGate):
    """Switchable Excitation Module, https://arxiv.org/abs/2209.05680.

    Pools the input to one vector per sample, lets each excitation operator turn it into channel logits, and weighs the
    operators by a learned, non-exclusive decision. The gate is the product of their sigmoids. With ``init='identity'``
    the module returns its input bit for bit until it is trained, and every operator learns from the first step on.

    Args:
        channels: Number of channels C.
        reduction: Bottleneck ratio of the fully connected operator; its hidden width is ``max(C // reduction, 4)``. The
            published code has ``round(C / 16)``, which is another width below 64 channels and where 16 does not divide
            them; ``init='paper'`` does not change it.
        operators: Names (see `excitation_names`) or classes with ``(channels, device=None, dtype=None)``, in any number
            from one up; the same one may occur twice.
        init: 'identity' for an exact identity with gates ``2 sigmoid``, 'paper' for the published initial values.
        channel_dim: 1 for (B, C, *spatial), -1 for (B, *spatial, C).
        num_prefix_tokens: For (B, N, C) inputs, how many leading tokens are left out of the pooling. All are gated.
        decision: 'sigmoid' as published, where any number of operators may count; 'softmax', where they share a sum of
            one; 'equal' for no decision at all, where each counts as 1.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Attributes:
        decision: Linear layer from the pooled features to one weight per operator; None with ``decision='equal'``.
        decision_form: How its outputs become weights, the argument ``decision``.
        operators: The excitation operators, in order, by name.

    Shape:
        - Input: (B, C, *spatial) or (B, *spatial, C), with one spatial axis or more.
        - Output: as the input.

    Raises:
        OptionError: If an argument is out of range or a name is unknown; the message lists what exists.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        operators: Sequence[str | ExcitationClass] = ('se', 'eca', 'ie'),
        init: Init = 'identity',
        channel_dim: int = 1,
        num_prefix_tokens: int = 0,
        decision: DecisionForm = 'sigmoid',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice('decision', decision, DECISION_FORMS)
        super().__init__(channels, reduction, operators, init, channel_dim, num_prefix_tokens, device, dtype)
        self.decision_form = decision
        self.decision: nn.Linear | None = None
        if decision != 'equal':
            self.decision = nn.Linear(channels, len(self.operators), device=device, dtype=dtype)

    def reset_parameters(self, init: Init | None = None) -> None:
        """Draw all parameters anew, the decision's too.

        Args:
            init: 'identity' or 'paper'; by default the form the module has.

        Raises:
            OptionError: If ``init`` is unknown, or 'identity' with an operator that has no ``zero_last_weights``.
        """
        super().reset_parameters(init)
        if self.decision is not None:
            self.decision.reset_parameters()

    def decide(self, x: Tensor) -> Tensor:
        """The decision vector (B, n): how much each operator's logits count, between 0 and 1."""
        return self._decide_pooled(self.pool(x))

    def operator_gates(self, x: Tensor) -> Tensor:
        """The factor (B, n, C) that each operator contributes; their product is the gate.

        It is ``2 sigmoid`` in the identity form and the sigmoid in the paper's, so an operator without a say, whose
        logits or decision are zero, has the factor 1 or 0.5.
        """
        logits, weights = self._weighted_pooled(self.pool(x))
        return torch.sigmoid(logits * weights) * (1.0 if self.form == 'paper' else 2.0)

    def _decide_pooled(self, pooled: Tensor) -> Tensor:
        if self.decision is None:
            return pooled.new_ones(pooled.shape[0], len(self.operators))
        weights = self.decision(pooled)
        return weights.softmax(-1) if self.decision_form == 'softmax' else torch.sigmoid(weights)

    def _weighted_pooled(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The operators' logits (B, n, C), and the decision (B, n, 1) that weighs them."""
        logits = torch.stack([operator(pooled) for operator in self.operators.values()], dim=1)
        return logits, self._decide_pooled(pooled).unsqueeze(-1)

    def _gate_pooled(self, pooled: Tensor) -> Tensor:
        logits = [operator(pooled) for operator in self.operators.values()]
        return _product_of_sigmoids(self._decide_pooled(pooled), *logits)

    def extra_repr(self) -> str:
        form = '' if self.decision_form == 'sigmoid' else f', decision={self.decision_form!r}'
        return super().extra_repr() + form


@one_node
def _product_of_sigmoids(weights: Tensor, *logits: Tensor) -> Tensor:
    """The product (B, C) of the sigmoids of logits (B, C), each times its weight out of (B, n)."""
    if not torch.is_grad_enabled() and may_write_over() and not is_recorded():
        return torch.stack(logits, dim=1).mul_(weights.unsqueeze(-1)).sigmoid_().prod(1)
    if len({one.dtype for one in logits}) > 1:  # under autocast
        dtype = functools.reduce(torch.promote_types, (one.dtype for one in logits))
        logits = tuple(one.to(dtype) for one in logits)
    if is_eager(weights, *logits):
        return cast(Tensor, _ProductOfSigmoids.apply(weights, *logits))
    return _product(_sigmoids(weights, logits))


def _sigmoids(weights: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
    return [torch.sigmoid(one * weights[:, index, None]) for index, one in enumerate(logits)]


def _product(factors: Sequence[Tensor]) -> Tensor:
    # Factor by factor, which is the same, bit for bit: programs that follow the channels of a model lose them in a
    # stack, and the gradient of prod(1) looks for zeros, which makes a GPU wait.
    return functools.reduce(torch.mul, factors)


class _ProductOfSigmoids(torch.autograd.Function):
    """The product, for whose gradient nothing is kept but the logits; sigmoids are quickly computed again."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *logits)
        return _product(_sigmoids(weights, logits))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        weights, *logits = ctx.saved_tensors
        factors = _sigmoids(weights, logits)
        of_sum = gradient * _product(factors)  # of the logarithm of the product
        of_weighted = [of_sum * (1 - factor) for factor in factors]
        of_weights = [(one * logit).sum(1) for one, logit in zip(of_weighted, logits)]
        return torch.stack(of_weights, 1), *(one * weights[:, index, None] for index, one in enumerate(of_weighted))


class Excitation(ChannelGate):
    """One excitation operator, such as SE, ECA or IE, as a channel attention of its own, without a decision.

    Has the interface of `SEM`, for comparison with it and as the simplest gate to insert.

    Args:
        channels: Number of channels C.
        excitation: A name (see `excitation_names`) or a class with ``(channels, device=None, dtype=None)``.
        reduction: Bottleneck ratio of the fully connected operator; its hidden width is ``max(C // reduction, 4)``.
        init: 'identity' for an exact identity with the gate ``2 sigmoid``, 'paper' for the published initial values.
        channel_dim: 1 for (B, C, *spatial), -1 for (B, *spatial, C).
        num_prefix_tokens: For (B, N, C) inputs, how many leading tokens are left out of the pooling. All are gated.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Shape:
        - Input: (B, C, *spatial) or (B, *spatial, C), with one spatial axis or more.
        - Output: as the input.

    Raises:
        OptionError: If an argument is out of range or a name is unknown; the message lists what exists.
    """

    def __init__(
        self,
        channels: int,
        excitation: str | ExcitationClass = 'se',
        reduction: int = 16,
        init: Init = 'identity',
        channel_dim: int = 1,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(excitation, (tuple, list)):
            raise OptionError(f'excitation={excitation!r}: Excitation has one operator; SEM takes several.')
        super().__init__(channels, reduction, (excitation,), init, channel_dim, num_prefix_tokens, device, dtype)

    def _gate_pooled(self, pooled: Tensor) -> Tensor:
        (operator,) = self.operators.values()
        return torch.sigmoid(operator(pooled))
