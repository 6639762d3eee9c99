"""Operations: what can be done to a model, as typed configurations; the one place where layers meet sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from sem_timm.errors import OptionError, closest
from sem_timm.layers import (
    GATE_INITS,
    SEM,
    ChannelsFirst,
    Excitation,
    excitation_names,
    timm_attention,
    timm_attention_names,
)
from sem_timm.surgery import BRANCHES, POSITIONS, Plan, Site, Target, apply_plan, check_choice, plan_insertion


@dataclass(frozen=True)
class InsertionConfig:
    """Where a module is inserted; base of the configurations below.

    Attributes:
        position: 'residual' puts it on the residual branch, right before the add; 'output' on what the block returns;
            'auto' on the branch of a block that has one, else on the output.
        branches: Of several residual branches in one block, such as a transformer's two, the 'last' or 'all'.
    """

    position: str = field(default='auto', kw_only=True)
    branches: str = field(default='last', kw_only=True)

    def __post_init__(self) -> None:
        check_choice('position', self.position, POSITIONS)
        check_choice('branches', self.branches, BRANCHES)

    @property
    def attribute(self) -> str:
        """Name of the new child in its block."""
        raise NotImplementedError

    @property
    def fuses_shortcut(self) -> bool:
        """Whether the module takes ``(branch, shortcut)`` and returns their sum."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether the module, as built, returns its input bit for bit."""
        return False

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Builds the module for a site."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The configuration as data that `json.dumps` takes."""
        return {'name': str(self), **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    def __str__(self) -> str:
        return self.attribute


@dataclass(frozen=True)
class SEMConfig(InsertionConfig):
    """Inserts the Switchable Excitation Module, https://arxiv.org/abs/2209.05680.

    Attributes:
        reduction: Bottleneck ratio of the fully connected operator.
        operators: Names or classes of excitation operators.
        init: 'identity' for a module that returns its input bit for bit until trained, 'paper' for the published one.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    reduction: int = 16
    operators: tuple[str | Callable[..., nn.Module], ...] = ('se', 'eca', 'ie')
    init: str = 'identity'

    def __post_init__(self) -> None:
        super().__post_init__()
        operators = (self.operators,) if isinstance(self.operators, str) else self.operators
        object.__setattr__(self, 'operators', tuple(operators))
        self._module(16, torch.device('meta'))  # its own checks speak before a model is looked at

    @property
    def attribute(self) -> str:
        return 'sem'

    @property
    def fuses_shortcut(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.init == 'identity'

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return self._module(site.channels, device, dtype=dtype, **_layout(site))

    def _module(self, channels: int, device: torch.device, **options: Any) -> nn.Module:
        init: Any = self.init
        return SEM(channels, self.reduction, self.operators, init, device=device, **options)


@dataclass(frozen=True)
class ExcitationConfig(InsertionConfig):
    """Inserts one excitation operator by itself: SE, ECA, IE, … as a system of its own.

    Attributes:
        operator: Name or class of the operator.
        reduction: Bottleneck ratio of the fully connected operator.
        init: As for `SEMConfig`.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    operator: str | Callable[..., nn.Module] = 'se'
    reduction: int = 16
    init: str = 'identity'

    def __post_init__(self) -> None:
        super().__post_init__()
        self._module(16, torch.device('meta'))

    @property
    def attribute(self) -> str:
        return self.operator if isinstance(self.operator, str) else 'excitation'

    @property
    def fuses_shortcut(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.init == 'identity'

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return self._module(site.channels, device, dtype=dtype, **_layout(site))

    def _module(self, channels: int, device: torch.device, **options: Any) -> nn.Module:
        init: Any = self.init
        return Excitation(channels, self.operator, self.reduction, init, device=device, **options)


@dataclass(frozen=True)
class TimmAttentionConfig(InsertionConfig):
    """Inserts one of timm's own channel attentions, which timm offers at build time for a few families.

    Attributes:
        name: A name of timm's ``create_attn`` that keeps the shape of its input.

    Raises:
        OptionError: If the name is unknown.
    """

    name: str = 'cbam'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in timm_attention_names():
            raise OptionError(f'timm attention {self.name!r} is unknown. {closest(self.name, timm_attention_names())}')

    @property
    def attribute(self) -> str:
        return self.name

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return timm_attention(self.name, site.channels, device=device, dtype=dtype, **_layout(site))


@dataclass(frozen=True)
class InsertConfig(InsertionConfig):
    """Inserts a module of one's own.

    Attributes:
        factory: Class or callable ``(channels) -> nn.Module``, for inputs (B, C, H, W) that keep their shape. On models
            with another layout it sees its inputs channels first all the same.
        name: Name of the new child in its block.

    Raises:
        OptionError: If the factory cannot be called or the name is no identifier.
    """

    factory: Callable[..., nn.Module]
    name: str = 'inserted'

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.factory):
            raise OptionError(f'factory={self.factory!r} is no callable (channels) -> nn.Module.')
        if not self.name.isidentifier():
            raise OptionError(f'name={self.name!r} is no identifier; it becomes a part of the state_dict keys.')

    @property
    def attribute(self) -> str:
        return self.name

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        with device:  # a factory need not know about devices
            module = self.factory(site.channels)
        if not isinstance(module, nn.Module):
            raise OptionError(f'{self.factory!r} returned a {type(module).__name__}, not an nn.Module.')
        module = module.to(dtype=dtype)
        return module if site.channel_dim == 1 else ChannelsFirst(module, site.num_prefix_tokens)


Operation = str | InsertionConfig | Callable[..., nn.Module]

# Excitation operators that are also systems of their own; other names are timm's.
_SINGLE_SYSTEMS = ('se', 'eca', 'ie')


def operation_names() -> tuple[str, ...]:
    """The short names that `plan_model` and `patch_model` understand."""
    own = ('sem', *_SINGLE_SYSTEMS, *excitation_names(), *timm_attention_names())
    return tuple(dict.fromkeys(own))


def resolve_operation(operation: Operation, **options: Any) -> InsertionConfig:
    """Makes a configuration of an operation's short name, class or configuration, and options.

    Raises:
        OptionError: If the operation or an option is unknown, or an option is out of range.
    """
    if isinstance(operation, InsertionConfig):
        if options:
            raise OptionError(
                f'options {", ".join(options)} were given beside a configuration; put them into it: '
                f'{type(operation).__name__}({next(iter(options))}=...).'
            )
        return operation
    if isinstance(operation, str):
        cls, fixed = _by_name(operation)
    elif callable(operation):
        cls, fixed = InsertConfig, {'factory': operation}
    else:
        raise OptionError(f'operation={operation!r} is neither a name, a configuration nor a module class.')
    known = [f.name for f in fields(cls) if f.name not in fixed]
    for name in options:
        if name not in known:
            raise OptionError(f'option {name!r} of operation {operation!r} is unknown. {closest(name, known)}')
    return cls(**fixed, **options)


def _by_name(name: str) -> tuple[type[InsertionConfig], dict[str, Any]]:
    if name == 'sem':
        return SEMConfig, {}
    if name in _SINGLE_SYSTEMS or (name in excitation_names() and name not in timm_attention_names()):
        return ExcitationConfig, {'operator': name}
    if name in timm_attention_names():
        return TimmAttentionConfig, {'name': name}
    raise OptionError(f'operation {name!r} is unknown. {closest(name, operation_names())}')


def plan_model(
    model: nn.Module,
    operation: Operation = 'sem',
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> Plan:
    """Plans an operation on a model without touching it: no weight is read, no random number drawn.

    Args:
        model: Any model with blocks; timm's know their input size.
        operation: 'sem', 'se', 'eca', 'ie', a name of timm's ``create_attn`` such as 'cbam', a configuration, or a
            module class ``(channels) -> nn.Module``.
        target: Which blocks: a regular expression that matches whole names, a list of names or dotted suffixes, a
            module class, or a callable ``(name, module) -> bool``. By default all.
        exclude: Which blocks not, by the same rules.
        input_size: Shape (C, H, W) of one input image, where the model does not say.
        **options: Fields of the operation's configuration, such as ``reduction`` or ``position``.

    Returns:
        The plan; printing it shows a table.

    Raises:
        SemTimmError: NoMatchError, RefusedError, OptionError or ModelError, each saying what to do.
    """
    config = resolve_operation(operation, **options)
    return plan_insertion(model, config, target=target, exclude=exclude, input_size=input_size)


def patch_model(
    model: nn.Module,
    operation: Operation | Plan = 'sem',
    *,
    target: Target | None = None,
    exclude: Target | None = None,
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    """Operates on a model in place, all of it or nothing; `unpatch_model` gives the model back as it was.

    Args:
        model: The model.
        operation: A plan from `plan_model`, or what `plan_model` takes; then the other arguments are its too.
        target: See `plan_model`.
        exclude: See `plan_model`.
        input_size: See `plan_model`.
        **options: See `plan_model`.

    Returns:
        The same model.

    Raises:
        SemTimmError: As `plan_model`, and PlanError if a plan does not fit the model. The model is then unchanged.
    """
    if isinstance(operation, Plan):
        extra = {'target': target, 'exclude': exclude, 'input_size': input_size, **options}
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise OptionError(f'{", ".join(given)} given beside a plan, which has them already; give them to plan_model.')
        return apply_plan(model, operation)
    plan = plan_model(model, operation, target=target, exclude=exclude, input_size=input_size, **options)
    return apply_plan(model, plan)


def _layout(site: Site) -> dict[str, int]:
    return {'channel_dim': site.channel_dim, 'num_prefix_tokens': site.num_prefix_tokens}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if callable(value):
        return f'{getattr(value, "__module__", "")}.{getattr(value, "__qualname__", repr(value))}'
    return value
