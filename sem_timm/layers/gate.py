"""What all channel gates share: pooling, layouts, the two forms, and the fused residual add."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sem_timm.errors import OptionError, check_choice
from sem_timm.layers.arguments import INITS, Init, check_at_least_one, check_layout
from sem_timm.layers.excitation import ZeroableExcitation
from sem_timm.layers.gated_sum import follows, gated_sum
from sem_timm.layers.operators import ExcitationClass, build_operators, check_zeroable
from sem_timm.layers.pool_and_scale import pooled, scaled
from sem_timm.layers.recording import refuse_script

AnyGate = TypeVar('AnyGate', bound='ChannelGate')

Entry = TypeVar('Entry')


_OLD_GAIN = '_extra_state'


class ChannelGate(nn.Module):
    """Base of modules that scale each channel of each sample by a number computed from the pooled input.

    A gate is a product of sigmoids, one per operator, and has two forms that differ in one factor, the buffer ``gain``.
    In the paper's form it is 1. In the identity form it is 2^n for n operators, so that logits of zero give a gate of
    exactly one in every floating-point type. The parameters mean the same in both; `set_form` changes from one to the
    other.

    Subclasses say how pooled features become the gate, in ``_gate_pooled``.
    """

    gain: Tensor
    init: Init
    _as_drawn: tuple[tuple[float, ...], ...] | None = None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        channels: int,
        reduction: int,
        operators: Sequence[str | ExcitationClass],
        init: Init,
        channel_dim: int,
        num_prefix_tokens: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_at_least_one('channels', channels)
        check_at_least_one('reduction', reduction)
        check_layout(channel_dim, num_prefix_tokens)
        self.channels = channels
        self.reduction = reduction
        self.channel_dim = channel_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.operators = build_operators(operators, channels, reduction, device=device, dtype=dtype)
        self.register_buffer('gain', torch.ones((), device=device, dtype=dtype))
        self._check_init(init)
        self._apply_init(init)

    @property
    def form(self) -> Init:
        """The form the gate is computed in: 'paper' (gain 1) or 'identity' (gain 2^n).

        Where the gain tells neither, as on the meta device or in memory that was not written yet, it is the form that
        was last asked for.
        """
        if type(self.gain) is not Tensor or self.gain.is_meta:
            return self.init
        gain = float(self.gain)
        return next((form for form in INITS if _is_about(gain, self._gain_of(form))), self.init)

    def set_form(self: AnyGate, form: Init) -> AnyGate:
        """Compute the gate in another form from now on, with the same parameters.

        The identity form is exactly 2^n times the paper's, bit for bit, n being the number of operators. A state_dict
        carries the gain, so weights mean the same in every module they are loaded into, however that was built. To go
        on in the identity form with the function of the paper's, let the caller carry the factor 2^-n, which is exact.

        Returns:
            The module itself.

        Raises:
            OptionError: If the form is unknown.
        """
        check_choice('form', form, INITS)
        self.init = form
        self.gain.fill_(self._gain_of(form))
        return self

    def _gain_of(self, form: Init) -> float:
        return 2.0 ** len(self.operators) if form == 'identity' else 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads as any module does, and reads what version 0.1.0 wrote.

        Raises:
            OptionError: If the gain is that of neither form.
        """
        old, key = prefix + _OLD_GAIN, f'{prefix}gain'
        if old in state_dict:
            state_dict[key] = state_dict.pop(old)
        gain = state_dict.get(key)
        if isinstance(gain, Tensor) and gain.numel() == 1 and not gain.is_meta:
            self._check_gain(float(gain))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_gain(self, gain: float) -> None:
        if not any(_is_about(gain, self._gain_of(form)) for form in INITS):
            raise OptionError(
                f'the state_dict holds a gain of {gain}, and with the operators {", ".join(self.operators)} it is 1 or '
                f'{self._gain_of("identity")}. Load it into a {type(self).__name__} with the operators it is of.'
            )

    def reset_parameters(self, init: Init | None = None) -> None:
        """Draw all parameters anew.

        Args:
            init: 'identity' or 'paper'; by default the form the module has.

        Raises:
            OptionError: If ``init`` is unknown, or 'identity' with an operator that has no ``zero_last_weights``.
        """
        init = self.form if init is None else init
        self._check_init(init)
        for module in self.operators.values():
            reset = getattr(module, 'reset_parameters', None)
            if callable(reset):
                reset()
        self._apply_init(init)

    @property
    def can_be_identity(self) -> bool:
        """Whether all operators have a ``zero_last_weights``."""
        return all(callable(getattr(operator, 'zero_last_weights', None)) for operator in self.operators.values())

    def become_identity(self) -> None:
        """Compute a gate of exactly one from now on, until it is trained: zeros for the last weights, all others stay.

        Raises:
            OptionError: If an operator has no ``zero_last_weights``.
        """
        self._check_init('identity')
        with torch.no_grad():
            self._apply_init('identity')

    def expect_base(self) -> None:
        """Take the values of now for drawn and not trained: while they stay, `state_beside_base` is an identity."""
        self._as_drawn = None
        if not any(parameter.is_meta for parameter in self.parameters()):
            self._as_drawn = tuple(tuple(_some_of(parameter).tolist()) for parameter in self.parameters())

    def state_beside_base(self) -> dict[str, Tensor] | None:
        """The state that weights of a base stand for, which have none for the gate: that of an identity.

        Returns:
            The state_dict of an identity, with the parameters of the gate but for the last ones; None for a gate that
            has something to lose, since it is no identity and was not drawn for want of better values.
        """
        if not self.can_be_identity:
            return None
        twin = copy.deepcopy(self)
        twin._apply_init('identity')
        own, identity = self.state_dict(), twin.state_dict()
        is_identity = all(torch.equal(own[key], identity[key]) for key in identity)
        return identity if is_identity or self._is_as_drawn() else None

    def _is_as_drawn(self) -> bool:
        """Whether all parameters are those that `expect_base` saw, up to a cast."""
        parameters = list(self.parameters())
        if self._as_drawn is None or len(parameters) != len(self._as_drawn):
            return False
        for parameter, known in zip(parameters, self._as_drawn, strict=True):
            now, then = _some_of(parameter).double().cpu(), torch.tensor(known, dtype=torch.float64)
            if not any(torch.equal(now, then.to(d).double()) for d in (parameter.dtype, torch.half, torch.bfloat16)):
                return False
        return True

    def _check_init(self, init: Init) -> None:
        """Refuse an initial form that is unknown, or that an operator cannot have."""
        check_choice('init', init, INITS)
        if init == 'identity':
            for name, operator in self.operators.items():
                check_zeroable(name, operator)

    def _apply_init(self, init: Init) -> None:
        """Give freshly drawn parameters an initial form that was checked."""
        self.set_form(init)
        if init == 'identity':
            for operator in self.operators.values():
                cast(ZeroableExcitation, operator).zero_last_weights()

    def pool(self, x: Tensor) -> Tensor:
        """Average over all positions but the prefix tokens: (B, C).

        Raises:
            OptionError: If the input has no positions to average over.
        """
        return pooled(x, self.channel_dim, self.num_prefix_tokens, type(self).__name__)

    def gate(self, x: Tensor) -> Tensor:
        """The attention vector (B, C) that the input is multiplied by."""
        return self._gate_of(self.pool(x))

    def forward(self, x: Tensor, shortcut: Tensor | None = None, shortcut_first: bool = False) -> Tensor:
        """Scale the channels of the input and add the shortcut, if one is given.

        Args:
            x: (B, C, *spatial) for ``channel_dim=1``, (B, *spatial, C) for ``channel_dim=-1``.
            shortcut: The other operand of the residual add, of the same shape.
            shortcut_first: The order of that sum, which matters where the two lie differently in memory: the result
                lies as its first operand does.

        Returns:
            ``x * gate`` or ``x * gate + shortcut``; the first has shape and type of the input.
        """
        source = follows(x, shortcut, self.channel_dim)
        if source is None or not self._pools_by_mean():
            return scaled(x, self._gate_pooled(self.pool(x)), self.gain, shortcut, shortcut_first, self.channel_dim)
        layout = (self.channel_dim, self.num_prefix_tokens)
        return gated_sum(x, source, self.pool, self._gate_of, shortcut, shortcut_first, *layout)

    def _pools_by_mean(self) -> bool:
        """Whether ``pool`` is that of this class, whose gradient is known."""
        return type(self).pool is ChannelGate.pool and 'pool' not in vars(self)

    def _gate_of(self, pooled: Tensor) -> Tensor:
        """The gate for pooled features (B, C)."""
        return self._gate_pooled(pooled) * self.gain

    def _gate_pooled(self, pooled: Tensor) -> Tensor:
        """The product of the operators' sigmoids for pooled features (B, C), before the gain."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [f'{self.channels}', f'form={self.form!r}', f'channel_dim={self.channel_dim}']
        if self.num_prefix_tokens:
            parts.append(f'num_prefix_tokens={self.num_prefix_tokens}')
        return ', '.join(parts)


def with_current_keys(entries: Mapping[str, Entry], expected: Container[str]) -> dict[str, Entry]:
    """Entries of a state_dict, some maybe of version 0.1.0, under the keys that are expected today.

    That version kept the gain of a gate under the name that torch has for what is neither parameter nor buffer.
    """
    current = {key: f'{key.removesuffix(_OLD_GAIN)}gain' for key in entries if key.endswith(_OLD_GAIN)}
    renamed = {key: new for key, new in current.items() if key not in expected and new in expected}
    return {renamed.get(key, key): entry for key, entry in entries.items()}


def _some_of(parameter: Tensor) -> Tensor:
    """Some values of a parameter, enough to tell whether it was trained."""
    return parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]


def _is_about(gain: float, expected: float) -> bool:
    """Whether a gain is the expected one, up to the rounding of averages over a training, such as timm's EMA."""
    return math.isclose(gain, expected, rel_tol=1e-2)
