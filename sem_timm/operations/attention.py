"""Other attentions in place of self-attention, as a typed configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sem_timm.errors import OptionError, closest
from sem_timm.layers import (
    VALUE_OPTIONS,
    WHOLE_ATTENTION,
    AttentionCore,
    MultiHeadExternalAttention,
    WithValues,
    attention_core_class,
    attention_core_names,
    attention_names,
    check_switches,
)
from sem_timm.operations.configs import plain
from sem_timm.surgery import AttentionSite, WholeSite

# What a site says and no option can.
_FROM_SITE = {'self', 'head_dim', 'value_dim', 'head_axis', 'dim', 'device', 'dtype'}

# What a site says where no option does; of dropout, only one that is replaced as a whole.
_FROM_SITE_UNLESS_GIVEN = ('num_heads', 'grid_size', 'num_prefix_tokens')
_DROPOUT = ('attn_drop', 'proj_drop')


@dataclass(frozen=True, init=False)
class AttentionConfig:
    """Puts another attention in place of self-attention; not an identity, so the model needs training afterwards.

    But for 'monarch', which is close to softmax attention as it is.
    A core of one's own is built as ``attention(head_dim, **options)`` with ``value_dim``, ``num_heads``, ``head_axis``,
    ``device`` and ``dtype`` by keyword, and also with ``grid_size`` and ``num_prefix_tokens`` if its constructor names
    ``grid_size``. Those two and ``num_heads`` may be options too, which win over what the model says.

    Attributes:
        attention: One of `attention_names`, or an own subclass of ``AttentionCore``. 'eamlp' replaces whole attention
            modules, the others their cores, and keep the projections around them.
        options: The options of the attention, such as ``memory``, as pairs. 'eamlp' takes the rates of dropout from the
            module it replaces unless they are given. Every other takes ``own=True`` and ``local=True`` beside its own,
            for maps of the values that are added to what the core returns; see ``WithValues``. They start at zero.

    Raises:
        OptionError: If the attention or an option is unknown, or an option is out of range.
    """

    attention: str | type[AttentionCore]
    options: tuple[tuple[str, Any], ...]

    def __init__(self, attention: str | type[AttentionCore] = 'external', **options: Any) -> None:
        object.__setattr__(self, 'attention', attention)
        values = {name: options.pop(name) for name in VALUE_OPTIONS if name in options}
        check_switches(**{name: values.get(name, False) for name in VALUE_OPTIONS})
        chosen = {name: True for name, value in values.items() if value}
        object.__setattr__(self, 'options', tuple(sorted({**options, **chosen}.items())))
        cls = self._class()
        if chosen and self.replaces_module:
            raise OptionError(f'{next(iter(chosen))}=True is for cores; {str(self)!r} replaces the whole module.')
        known = [name for name in _parameters(cls) if name not in _FROM_SITE]
        if chosen:
            known += ['grid_size', 'num_prefix_tokens']
        for name in options:
            if name not in known:
                names = [*known, *(() if self.replaces_module else VALUE_OPTIONS)]
                raise OptionError(f'option {name!r} of attention {str(self)!r} is unknown. {closest(name, names)}')
        try:
            self._example()  # its own checks speak before a model is looked at
        except OptionError:
            raise
        except (TypeError, ValueError) as error:  # of torch's own modules, such as for a dropout above 1
            raise OptionError(f'attention {str(self)!r} cannot be built with {options}: {error}') from error

    def _example(self) -> nn.Module:
        """What it builds, of some width and without memory."""
        options: dict[str, Any] = {'num_heads': 1, 'device': torch.device('meta'), **self._core_options()}
        heads = options['num_heads']
        module: nn.Module = self._class()(32 * heads if isinstance(heads, int) and heads > 0 else 32, **options)
        return self._with_values(module, {'device': torch.device('meta')}) if self.reads_values else module

    def _class(self) -> Any:
        if isinstance(self.attention, type) and issubclass(self.attention, AttentionCore):
            return self.attention
        if not isinstance(self.attention, str):
            raise OptionError(f'attention={self.attention!r} is neither a name nor a subclass of AttentionCore.')
        if self.attention == WHOLE_ATTENTION:
            return MultiHeadExternalAttention
        if self.attention not in attention_core_names():
            raise OptionError(f'attention {self.attention!r} is unknown. {closest(self.attention, attention_names())}')
        return attention_core_class(self.attention)

    @property
    def reads_values(self) -> bool:
        """Whether the new core adds parts of the values to what it returns."""
        return any(name in VALUE_OPTIONS for name, _ in self.options)

    def _core_options(self) -> dict[str, Any]:
        """The options that the core itself takes."""
        own = _parameters(self._class())
        return {n: v for n, v in self.options if n in own or not self.reads_values}

    def _with_values(self, core: Any, grid: dict[str, Any]) -> WithValues:
        given = dict(self.options)
        return WithValues(core, 'own' in given, 'local' in given, **grid)

    def with_defaults(self) -> AttentionConfig:
        """An equal configuration that names all options, but for those that a site decides where they are not given."""
        decided = {*_FROM_SITE, *_FROM_SITE_UNLESS_GIVEN, *(_DROPOUT if self.replaces_module else ())}
        found = _parameters(self._class()).values()
        defaults = {p.name: p.default for p in found if p.name not in decided and p.default is not p.empty}
        return AttentionConfig(self.attention, **{**defaults, **dict(self.options)})

    @property
    def attribute(self) -> str:
        """Name of the new child in its attention module."""
        return 'core'

    @property
    def reads_keys(self) -> bool:
        """Whether the new core takes ``(q, k, v)``; otherwise ``(q)``."""
        return not self.replaces_module and (self.reads_values or bool(self._class().reads_keys))

    @property
    def folds_projection(self) -> bool:
        """Whether it may take the projection of its queries together with a weight of its own."""
        return not self.replaces_module and not self.reads_values and hasattr(self._class(), 'attend_folded')

    @property
    def takes_pairwise_mask(self) -> bool:
        """Whether it honours a mask for pairs of tokens."""
        takes = not self.replaces_module and not self.reads_values
        return takes and bool(self._class().takes_pairwise_mask)

    @property
    def fidelity(self) -> str:
        """What a trained model was measured to keep of its skill without training; empty where it needs training."""
        return '' if self.replaces_module else str(self._class().fidelity)

    @property
    def replaces_module(self) -> bool:
        """Whether it replaces whole attention modules."""
        return self.attention == WHOLE_ATTENTION

    @property
    def has_tensors(self) -> bool:
        """Whether what it builds has anything in its state_dict."""
        return bool(self._example().state_dict())

    @property
    def is_identity(self) -> bool:
        """False: the outputs change."""
        return False

    def build(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Builds the core, or module, for a site."""
        options = self._core_options()
        cls = self._class()
        options.setdefault('num_heads', site.num_heads)
        if self.replaces_module:
            options = {**_dropout_of(site), **options}
            module: nn.Module = cls(site.shape[-1], device=device, dtype=dtype, **options)
            return module
        if 'grid_size' in _parameters(cls):
            options.update(self._grid(site))
        value_dim, axis = site.value_shape[-1], site.head_axis
        core: nn.Module = cls(
            site.shape[-1], value_dim=value_dim, head_axis=axis, device=device, dtype=dtype, **options
        )
        if not self.reads_values:
            return core
        if site.shape[-2] != site.value_shape[-2]:
            raise OptionError(
                f'there are {site.shape[-2]} queries and {site.value_shape[-2]} values; own=True and local=True need a '
                f'value for each query. Leave them out: {self}.'
            )
        grid = self._grid(site) if 'local' in dict(self.options) else self._prefix(site)
        return self._with_values(core, {**grid, 'device': device, 'dtype': dtype})

    def _prefix(self, site: AttentionSite) -> dict[str, Any]:
        return {'num_prefix_tokens': dict(self.options).get('num_prefix_tokens', site.num_prefix_tokens)}

    def _grid(self, site: AttentionSite) -> dict[str, Any]:
        """The grid of a site's tokens: the options, where they are given, else what the model says."""
        found = {'grid_size': site.grid_size, 'num_prefix_tokens': site.num_prefix_tokens, **dict(self.options)}
        size, prefix, tokens = found['grid_size'], found['num_prefix_tokens'], site.shape[-2]
        if size is not None and size[0] * size[1] + prefix == tokens:
            return {'grid_size': size, 'num_prefix_tokens': prefix}
        known = 'of which height and width are not known' if size is None else f'not those of grid_size={size}'
        raise OptionError(
            f'there are {tokens} tokens, {prefix} of them prefix tokens, {known}. '
            f'Say what they are: {self}, grid_size=(height, width), num_prefix_tokens=1 for a class token.'
        )

    @property
    def scales_output(self) -> bool:
        """Whether what it builds can be told by which number to multiply its outputs."""
        return hasattr(self._class(), 'scale_output')

    def scale_output(self, new: nn.Module, factor: float) -> None:
        """Multiplies all outputs of a new child by a number, for good."""
        scaled: Any = new.core if isinstance(new, WithValues) else new
        scaled.scale_output(factor)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as data that `json.dumps` takes."""
        return {'name': str(self), **{name: plain(value) for name, value in self.options}}

    def __str__(self) -> str:
        return self.attention if isinstance(self.attention, str) else self.attention.__name__


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a constructor takes; where it hands ``**kwargs`` on, also what that of the next class takes."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if '__init__' not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__['__init__']).parameters.values()
        stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found |= {p.name: p for p in parameters if p.kind not in stars and p.name not in found}
        if base is AttentionCore or not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def _dropout_of(site: AttentionSite) -> dict[str, float]:
    """The rates of dropout of a module that is replaced as a whole."""
    return {name: getattr(site, name) for name in _DROPOUT} if isinstance(site, WholeSite) else {}
