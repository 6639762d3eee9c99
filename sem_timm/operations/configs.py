"""What can be done to a model, as typed configurations; the one place where layers meet sites."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from sem_timm.errors import OptionError, check_choice, closest
from sem_timm.layers import (
    SEM,
    TIMM_PREFIX,
    ChannelsFirst,
    Excitation,
    ExternalAttention2d,
    ScaleAndShift,
    timm_attention,
    timm_attention_names,
)
from sem_timm.surgery import BRANCHES, POSITIONS, Site


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
        """Whether the module takes ``(branch, shortcut, shortcut_first=False)`` and returns their sum."""
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
        options = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != 'name'}
        return {'name': str(self), **options}

    def __str__(self) -> str:
        return self.attribute


class _GateConfig(InsertionConfig):
    """What the configurations of SEM and of a single operator share."""

    init: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._module(16, device=torch.device('meta'))  # its own checks speak before a model is looked at

    @property
    def fuses_shortcut(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.init == 'identity'

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return self._module(site.channels, device=device, dtype=dtype, **_layout(site))

    def _module(self, channels: int, **options: Any) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class SEMConfig(_GateConfig):
    """Inserts the Switchable Excitation Module, https://arxiv.org/abs/2209.05680.

    Attributes:
        reduction: Bottleneck ratio of the fully connected operator.
        operators: Names or classes of excitation operators.
        init: 'identity' for a module that returns its input bit for bit until trained, 'paper' for the published one.
        decision: How the operators are weighed: 'sigmoid' as published, 'softmax', or 'equal' for no decision.
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    reduction: int = 16
    operators: tuple[str | Callable[..., nn.Module], ...] = ('se', 'eca', 'ie')
    init: str = 'identity'
    decision: str = 'sigmoid'

    def __post_init__(self) -> None:
        operators: Any = self.operators
        if isinstance(operators, str) or callable(operators):
            operators = (operators,)
        if not isinstance(operators, (tuple, list)):
            raise OptionError(f"operators={operators!r} is no list of names or classes, such as ('se', 'eca', 'ie').")
        object.__setattr__(self, 'operators', tuple(operators))
        super().__post_init__()

    @property
    def attribute(self) -> str:
        return 'sem'

    def _module(self, channels: int, **options: Any) -> nn.Module:
        forms: dict[str, Any] = {'init': self.init, 'decision': self.decision}  # any text; the layer checks it
        return SEM(channels, reduction=self.reduction, operators=self.operators, **forms, **options)


@dataclass(frozen=True)
class ExcitationConfig(_GateConfig):
    """Inserts one excitation operator by itself: SE, ECA, IE, … as a system of its own.

    Attributes:
        excitation: Name or class of an excitation operator, see `excitation_names`.
        reduction: Bottleneck ratio of the fully connected operator.
        init: As for `SEMConfig`.
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    excitation: str | Callable[..., nn.Module] = 'se'
    reduction: int = 16
    init: str = 'identity'

    @property
    def attribute(self) -> str:
        return self.excitation if isinstance(self.excitation, str) else 'excitation'

    def _module(self, channels: int, **options: Any) -> nn.Module:
        return Excitation(channels, self.excitation, reduction=self.reduction, init=_init(self.init), **options)


@dataclass(frozen=True)
class ScaleAndShiftConfig(InsertionConfig):
    """Inserts one learned scale and shift per channel, SSF, https://arxiv.org/abs/2210.08823.

    Returns its input bit for bit until it is trained. Published behind every operation of a network; here it is where
    the gates are.

    Attributes:
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    @property
    def attribute(self) -> str:
        return 'ssf'

    @property
    def is_identity(self) -> bool:
        return True

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return ScaleAndShift(site.channels, site.channel_dim, device=device, dtype=dtype)


@dataclass(frozen=True)
class TimmAttentionConfig(InsertionConfig):
    """Inserts one of timm's own channel attentions, which timm offers at build time for a few families.

    By name, it is the operation 'timm_cbam' and the like. The outputs change.

    Attributes:
        name: A name of timm's ``create_attn``, such as 'cbam', of those that keep the shape of their input.
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If the name is unknown.
    """

    name: str = 'cbam'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in timm_attention_names():
            raise OptionError(
                f'timm attention {self.name!r} is unknown. {closest(str(self.name), timm_attention_names())}'
            )

    @property
    def attribute(self) -> str:
        return f'{TIMM_PREFIX}{self.name}'

    @property
    def has_tensors(self) -> bool:
        """Whether what it builds has anything in its state_dict."""
        return bool(timm_attention(self.name, 64, device=torch.device('meta')).state_dict())

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return timm_attention(self.name, site.channels, device=device, dtype=dtype, **_layout(site))


@dataclass(frozen=True)
class ExternalAttention2dConfig(InsertionConfig):
    """Inserts External Attention over the positions of feature maps, https://arxiv.org/abs/2105.02358.

    Attributes:
        memory: Number of memory slots.
        init: 'identity' for a module that returns its input bit for bit until trained, 'paper' for the published one.
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`; by default 'output'.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    memory: int = 64
    init: str = 'identity'
    position: str = field(default='output', kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        ExternalAttention2d(16, self.memory, _init(self.init), device='meta')  # its own checks speak first

    @property
    def attribute(self) -> str:
        return 'external2d'

    @property
    def is_identity(self) -> bool:
        return self.init == 'identity'

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        module = ExternalAttention2d(site.channels, self.memory, _init(self.init), device=device, dtype=dtype)
        return module if site.channel_dim == 1 else ChannelsFirst(module, site.num_prefix_tokens)


@dataclass(frozen=True)
class InsertConfig(InsertionConfig):
    """Inserts a module of one's own.

    Attributes:
        factory: Class or callable ``(channels) -> nn.Module``, for inputs (B, C, H, W) that keep their shape. On models
            with another layout it sees its inputs channels first all the same.
        name: Name of the new child in its block.
        position: Where in a block: 'auto', 'residual' or 'output', see `plan_model`.
        branches: Of several residual branches in one block, the 'last' or 'all'.

    Raises:
        OptionError: If the factory cannot be called or the name is no identifier.
    """

    factory: Callable[..., nn.Module]
    name: str = 'inserted'

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factory, nn.Module):
            name = type(self.factory).__name__
            raise OptionError(
                f'factory is one {name}, and each site needs its own; give the class {name}, or a function.'
            )
        if not callable(self.factory) or (isinstance(self.factory, type) and issubclass(self.factory, InsertionConfig)):
            raise OptionError(f'factory={self.factory!r} is no class or function (channels) -> nn.Module.')
        if not isinstance(self.name, str) or not self.name.isidentifier() or keyword.iskeyword(self.name):
            raise OptionError(f'name={self.name!r} is no identifier; it becomes a part of the state_dict keys.')

    @property
    def attribute(self) -> str:
        return self.name

    def build(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module:
        with device:  # a factory need not know about devices
            module = self.factory(site.channels)
        if not isinstance(module, nn.Module):
            raise OptionError(f'{self.factory!r} returned a {type(module).__name__}, not an nn.Module.')
        module = module.to(dtype=dtype) if device.type == 'meta' else module.to(device=device, dtype=dtype)
        return module if site.channel_dim == 1 else ChannelsFirst(module, site.num_prefix_tokens)


def _layout(site: Site) -> dict[str, int]:
    return {'channel_dim': site.channel_dim, 'num_prefix_tokens': site.num_prefix_tokens}


def _init(name: str) -> Any:
    return name  # any text may have been given; the layer checks it


def plain(value: Any) -> Any:
    """An option as data that `json.dumps` takes: a class by its name, a tuple as a list."""
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if callable(value):
        return f'{getattr(value, "__module__", "")}.{getattr(value, "__qualname__", repr(value))}'
    return value
